# SPDX-License-Identifier: Apache-2.0
"""A ModelInferRequest becomes the request and the tensors' bytes that the dispatcher takes.

Only what can be wrong in KServe's form itself is checked here. Whether names, types, shapes and
sizes fit the model is for the worker to say, which knows it and trusts nobody.
"""

from thirdrail import dtypes
from thirdrail.dtypes import Buffer
from thirdrail.errors import InvalidArgument
from thirdrail.lane.input_arena import Piece, Source
from thirdrail.v1 import inference_pb2
from thirdrail_server.front.control.catalog import parse_version
from thirdrail_server.front.field_count import check_field_count
from thirdrail_server.front.kserve import parameters
from thirdrail_server.front.kserve.contents import bytes_of_contents
from thirdrail_server.front.kserve.cuda_regions import CudaPart
from thirdrail_server.front.kserve.regions import RequestRegions
from thirdrail_server.front.wire import LARGE_BYTES_MIN, Large, detach, parsed
from thirdrail_server.inference import grpc_service_pb2 as kserve

Input = kserve.ModelInferRequest.InferInputTensor
Data = list[Piece | None]

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
    request: kserve.ModelInferRequest,
    large: Large = (),
    *,
    regions: RequestRegions,
    time_left_us: int | None,
) -> tuple[inference_pb2.InferRequest, Data]:
    """The native request, and the bytes of each of its inputs in their order, or where they are.

    large: per entry of raw_input_contents its bytes, None where they are in the request; empty:
        they are for all.
    regions: its `targets` get the outputs that are to be written to regions.
    time_left_us: until the gRPC deadline; None: there is none. The nearer of it and the request's
    own timeout counts. Raises InvalidArgument; for a tensor in a shared-memory region NotFound,
    and Unimplemented where the server has none.
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
    data = _add_inputs(request, regions, large, native)
    for output in request.outputs:
        _add_output(output, regions, native)
    return native, data


def _add_inputs(
    request: kserve.ModelInferRequest,
    regions: RequestRegions,
    large: Large,
    native: inference_pb2.InferRequest,
) -> Data:
    data: Data = []
    raw_index = 0  # raw_input_contents has entries for the inputs that are in no region
    for tensor in request.inputs:
        source, region = _source_in_region(tensor, regions), None
        if isinstance(source, CudaPart):
            data.append(None)
            region = source.ref
        elif source is not None:
            data.append(source)
        else:
            data.append(_bytes_of_input(request, tensor, large, raw_index))
            raw_index += 1
        native.inputs.add(
            name=tensor.name,
            data_type=_data_type(tensor, request.model_name),
            shape=tensor.shape,
            region=region,
        )
    return data


def _source_in_region(tensor: Input, regions: RequestRegions) -> Source | CudaPart | None:
    wanted = parameters.region_range(tensor.name, tensor.parameters)
    if wanted is None:
        return None
    if tensor.HasField("contents"):
        raise InvalidArgument(
            "unexpected 'content' provided when using shared memory for input tensor "
            f"'{tensor.name}'"
        )
    return regions.part(wanted)


def _bytes_of_input(
    request: kserve.ModelInferRequest, tensor: Input, large: Large, index: int
) -> Buffer:
    """index: which entry of raw_input_contents is the tensor's, if there are any."""
    raw, model = request.raw_input_contents, request.model_name
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
    regions: RequestRegions,
    native: inference_pb2.InferRequest,
) -> None:
    class_count = parameters.class_count(output.name, output.parameters)
    wanted = parameters.region_range(output.name, output.parameters)
    region = None
    if wanted is not None:
        part = regions.targets[output.name] = regions.part(wanted)
        region = part.ref if isinstance(part, CudaPart) else None
    native.outputs.add(
        name=output.name,
        form=inference_pb2.OUTPUT_FORM_RAW,
        class_count=class_count,
        region=region,
    )
