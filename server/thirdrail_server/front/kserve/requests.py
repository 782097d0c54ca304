# SPDX-License-Identifier: Apache-2.0
"""A ModelInferRequest becomes the request and the raw tensor bytes that the dispatcher takes.

Only what can be wrong in KServe's form itself is checked here. Whether names, types, shapes and
sizes fit the model is for the worker to say, which knows it and trusts nobody.
"""

from thirdrail import dtypes
from thirdrail.dtypes import Buffer
from thirdrail.errors import InvalidArgument
from thirdrail.v1 import inference_pb2
from thirdrail_server.front.control.catalog import parse_version
from thirdrail_server.front.field_count import check_field_count
from thirdrail_server.front.kserve import parameters
from thirdrail_server.front.kserve.contents import bytes_of_contents
from thirdrail_server.front.wire import LARGE_BYTES_MIN, Large, detach, parsed
from thirdrail_server.inference import grpc_service_pb2 as kserve

Input = kserve.ModelInferRequest.InferInputTensor
Data = list[Buffer | None]

_RAW_INPUT_CONTENTS = kserve.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER


def parsed_request(body: bytes) -> tuple[kserve.ModelInferRequest, Large]:
    """The request with its large raw_input_contents empty, and the bytes that were in them.

    Raises InvalidArgument when the bytes are no such message.
    """
    if len(body) < LARGE_BYTES_MIN:
        return parsed(kserve.ModelInferRequest, body), []
    check_field_count(kserve.ModelInferRequest.DESCRIPTOR, body)
    rest, large = detach(body, _RAW_INPUT_CONTENTS, None)
    return parsed(kserve.ModelInferRequest, rest, len(body)), large


def native_request(
    request: kserve.ModelInferRequest, large: Large = (), *, time_left_us: int | None
) -> tuple[inference_pb2.InferRequest, Data]:
    """The native request, and the bytes of each of its inputs in their order.

    large: per entry of raw_input_contents its bytes, None where they are in the request; empty:
        they are for all.
    time_left_us: until the gRPC deadline; None: there is none. The nearer of it and the request's
    own timeout counts. Raises InvalidArgument; and Unimplemented for a tensor in a shared-memory
    region.
    """
    native = inference_pb2.InferRequest(
        model_name=request.model_name,
        model_version=parse_version(request.model_version),
        request_id=request.id,
    )
    parameters.apply_request_parameters(request.parameters, native)
    if time_left_us is not None:
        # 0 would mean "no timeout", so a deadline that has just passed leaves one microsecond.
        time_left_us = max(1, time_left_us)
        native.timeout_us = min(native.timeout_us or time_left_us, time_left_us)
    data = _add_inputs(request, large, native)
    for output in request.outputs:
        _add_output(output, native)
    return native, data


def _add_inputs(
    request: kserve.ModelInferRequest, large: Large, native: inference_pb2.InferRequest
) -> Data:
    data: Data = []
    for index, tensor in enumerate(request.inputs):
        _refuse_region_input(tensor)
        data.append(_bytes_of_input(request, large, index))
        native.inputs.add(
            name=tensor.name, data_type=_data_type(tensor, request.model_name), shape=tensor.shape
        )
    return data


def _refuse_region_input(tensor: Input) -> None:
    if not parameters.has_region(tensor.name, tensor.parameters):
        return
    if tensor.HasField("contents"):
        raise InvalidArgument(
            "unexpected 'content' provided when using shared memory for input tensor "
            f"'{tensor.name}'"
        )
    raise parameters.refuse_region(tensor.name, "send its bytes in raw_input_contents")


def _bytes_of_input(request: kserve.ModelInferRequest, large: Large, index: int) -> Buffer:
    tensor, raw, model = request.inputs[index], request.raw_input_contents, request.model_name
    if raw and tensor.HasField("contents"):
        raise InvalidArgument(
            "contents field must not be specified when using raw_input_contents for "
            f"'{tensor.name}' for model '{model}'"
        )
    if index < len(raw):
        taken = large[index] if large else None
        return raw[index] if taken is None else taken
    if tensor.HasField("contents"):
        return bytes_of_contents(tensor, model)
    raise InvalidArgument(
        f"unable to find data for input tensor '{tensor.name}' for model '{model}' in request."
    )


def _data_type(tensor: Input, model: str) -> int:
    dtype = dtypes.BY_NAME.get(tensor.datatype)
    if dtype is None:
        raise InvalidArgument(
            f"inference input '{tensor.name}' for model '{model}' has the unknown data-type "
            f"'{tensor.datatype}', expected one of {', '.join(dtypes.BY_NAME)}"
        )
    return dtype.value


def _add_output(
    output: kserve.ModelInferRequest.InferRequestedOutputTensor,
    native: inference_pb2.InferRequest,
) -> None:
    class_count = parameters.class_count(output.name, output.parameters)
    if parameters.has_region(output.name, output.parameters):
        raise parameters.refuse_region(output.name, "ask for it without the region")
    native.outputs.add(
        name=output.name, form=inference_pb2.OUTPUT_FORM_RAW, class_count=class_count
    )
