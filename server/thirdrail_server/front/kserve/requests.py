# SPDX-License-Identifier: Apache-2.0
"""A ModelInferRequest becomes the request and the raw tensor bytes that the dispatcher takes.

Only what can be wrong in KServe's form itself is checked here. Whether names, types, shapes and
sizes fit the model is for the worker to say, which knows it and trusts nobody.
"""

from collections.abc import Sequence

from thirdrail import dtypes
from thirdrail.errors import InvalidArgument
from thirdrail.v1 import inference_pb2
from thirdrail_server.front.control.catalog import parse_version
from thirdrail_server.front.kserve import parameters
from thirdrail_server.front.kserve.contents import bytes_of_contents
from thirdrail_server.inference import grpc_service_pb2 as kserve

Input = kserve.ModelInferRequest.InferInputTensor
Data = list[bytes | None]


def native_request(
    request: kserve.ModelInferRequest, *, time_left_us: int | None
) -> tuple[inference_pb2.InferRequest, Data]:
    """The native request, and the bytes of each of its inputs in their order.

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
    data = _add_inputs(request, native)
    for output in request.outputs:
        _add_output(output, native)
    return native, data


def _add_inputs(request: kserve.ModelInferRequest, native: inference_pb2.InferRequest) -> Data:
    data: Data = []
    raw = request.raw_input_contents
    for tensor in request.inputs:
        _refuse_region_input(tensor)
        data.append(_bytes_of_input(tensor, len(data), raw, request.model_name))
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


def _bytes_of_input(tensor: Input, index: int, raw: Sequence[bytes], model: str) -> bytes:
    if raw and tensor.HasField("contents"):
        raise InvalidArgument(
            "contents field must not be specified when using raw_input_contents for "
            f"'{tensor.name}' for model '{model}'"
        )
    if index < len(raw):
        return raw[index]
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
