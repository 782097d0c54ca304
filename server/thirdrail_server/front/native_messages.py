# SPDX-License-Identifier: Apache-2.0
"""thirdrail.v1 messages between gRPC's bytes and the dispatcher: parsing, limits, serializing.

Pure code. Large tensors never pass through protobuf, see wire.py.
"""

import itertools

from thirdrail import dtypes, tensors
from thirdrail.dtypes import Buffer
from thirdrail.errors import InvalidArgument, ThirdrailError
from thirdrail.lane.packets import varint
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import tensor_pb2
from thirdrail_server.front import wire
from thirdrail_server.front.dispatch import Result
from thirdrail_server.front.field_count import check_field_count
from thirdrail_server.front.wire import LARGE_BYTES_MIN, Large, parsed

# Numbers of fields: InferRequest.inputs, InferResponse.outputs, Tensor.raw, InferStream*.infer.
_INPUTS, _OUTPUTS, _RAW, _STREAM_INFER = 6, 8, 4, 1
_DATA_OVER_GRPC = frozenset(("raw", "values", None))  # of Tensor.data; None: refused later
VALUES_BYTES_MAX = 32 << 10  # that stay as they are, in one request; half a packet of the lane
_TIMEOUT_KEY = bytes((10 << 3 | 0,))  # of InferRequest.timeout_us: number << 3 | wire type


def parsed_request(body: bytes) -> tuple[pb.InferRequest, Large]:
    """The request without its large tensors' bytes, and those. Raises InvalidArgument."""
    if len(body) < LARGE_BYTES_MIN:
        return parsed(pb.InferRequest, body), []
    check_field_count(pb.InferRequest.DESCRIPTOR, body)
    rest, large = wire.detach(body, _INPUTS, _RAW)
    return parsed(pb.InferRequest, rest, len(body)), large


def parsed_stream_request(body: bytes) -> tuple[pb.InferStreamRequest, Large]:
    """The same for a message of a stream."""
    if len(body) < LARGE_BYTES_MIN:
        return parsed(pb.InferStreamRequest, body), []
    check_field_count(pb.InferStreamRequest.DESCRIPTOR, body)
    rest, infer = wire.detach(body, _STREAM_INFER, None)
    message = parsed(pb.InferStreamRequest, rest, len(body))
    if message.WhichOneof("message") != "infer" or len(infer) != 1 or infer[0] is None:
        return parsed(pb.InferStreamRequest, body), []
    request, large = parsed_request(bytes(infer[0]))
    message.infer.CopyFrom(request)
    return message, large


def request_alone(body: bytes) -> bytes | None:
    """The serialized InferRequest in a small message of a stream that holds nothing else, which is
    the usual case; None where the message has to be taken apart."""
    return wire.only_field(body, _STREAM_INFER) if len(body) < LARGE_BYTES_MIN else None


def refuse_references(request: pb.InferRequest) -> None:
    """Raises InvalidArgument for what only sessions on the lane may say.

    Requests are sent on through the front's own session, so that memory would be the front's own,
    or a region that somebody else has registered.
    """
    for tensor in request.inputs:
        if tensor.WhichOneof("data") not in _DATA_OVER_GRPC:
            raise InvalidArgument(
                f"tensor '{tensor.name}' is a memory reference; over gRPC, send raw bytes or values"
            )
    for output in request.outputs:
        if output.on_device or output.HasField("region"):
            raise InvalidArgument(
                f"output '{output.name}' is wanted in memory on a device; over gRPC it comes "
                "in the message"
            )
    if request.event_place:
        raise InvalidArgument("event_place means nothing over gRPC: it is for sessions on the lane")


def limit_time(request: pb.InferRequest, seconds_left: float | None) -> bytes:
    """Let the gRPC deadline count as the request's timeout where it is nearer.

    Returns what must be appended to the serialized request to the same effect: in protobuf's wire
    format the last value of a field counts.
    """
    if seconds_left is None:
        return b""
    left_us = max(1, int(seconds_left * 1e6))
    if request.timeout_us and request.timeout_us <= left_us:
        return b""
    request.timeout_us = left_us
    return _TIMEOUT_KEY + varint(left_us)


def take_raw(request: pb.InferRequest, large: Large) -> list[Buffer | None]:
    """Per input its raw bytes, taken out of the request so that they are not sent twice.

    Raises InvalidArgument for many values that do not fit their type or shape.
    """
    data: list[Buffer | None] = []
    room = VALUES_BYTES_MAX
    for tensor, taken in itertools.zip_longest(request.inputs, large):
        form = tensor.WhichOneof("data")
        if form == "raw":
            data.append(tensor.raw if taken is None else taken)
            tensor.ClearField("raw")
        elif form == "values" and tensor.values.ByteSize() > room:
            data.append(_bytes_of_values(tensor))
            tensor.ClearField("values")
        else:
            room -= tensor.values.ByteSize()
            data.append(None)
    return data


def _bytes_of_values(tensor: tensor_pb2.Tensor) -> Buffer:
    """Values too many for a packet of the lane go on as raw bytes."""
    dtype = dtypes.dtype_of_value(tensor.data_type)
    array = tensors.array_of_values(tensor.name, dtype, tensor.shape, tensor.values)
    return tensors.bytes_of_array(array)


def serialized(result: Result) -> bytes:
    """The response as unary calls answer. Its memory is released."""
    return wire.joined(_pieces(result))


def streamed(result: Result) -> bytes:
    """The response as a message of a stream. Its memory is released."""
    return wire.joined(wire.bytes_field(_STREAM_INFER, *_pieces(result)))


def streamed_failure(call: int, request_id: str, error: ThirdrailError) -> bytes:
    """A failed request as a message of a stream, which goes on."""
    status = pb.Status(reason=error.reason, message=error.message)
    response = pb.InferResponse(call=call, request_id=request_id, final=True, status=status)
    return wire.joined(wire.bytes_field(_STREAM_INFER, response.SerializeToString()))


def _pieces(result: Result) -> list[Buffer]:
    """The serialized response in pieces; results that lie in memory are pieces of their own.

    They are released here already: whoever gets them copies them before the next await, and not
    before that can a release be sent.
    """
    response = result.response
    try:
        if response.HasField("timing"):
            response.timing.transport = "grpc"
            response.timing.copies += 2  # out of the request's message and into the response's
        if not any(tensor.HasField("ref") for tensor in response.outputs):
            return [response.SerializeToString()]
        head = pb.InferResponse()
        head.CopyFrom(response)
        head.ClearField("outputs")
        pieces: list[Buffer] = [head.SerializeToString()]
        for tensor, data in zip(response.outputs, result.data, strict=True):
            raw: list[Buffer] = []
            if data is not None and tensor.HasField("ref"):
                tensor.ClearField("ref")
                raw = wire.bytes_field(_RAW, data)
            pieces += wire.bytes_field(_OUTPUTS, tensor.SerializeToString(), *raw)
        return pieces
    finally:
        result.release()
