# SPDX-License-Identifier: Apache-2.0
"""What came back from the dispatcher becomes a ModelInferResponse, or one message of a stream.

Tensors always leave as raw_output_contents, one entry per output and in the same order; `contents`
is never used, and an output without elements has an empty entry. The entries do not go through
protobuf: each is copied once, from where the dispatcher has it into the serialized message.
"""

from collections.abc import Sequence

from thirdrail import dtypes, tensors
from thirdrail.dtypes import Buffer
from thirdrail.errors import ThirdrailError
from thirdrail.v1 import inference_pb2, tensor_pb2
from thirdrail_server.front.kserve import status
from thirdrail_server.front.wire import bytes_field, joined
from thirdrail_server.inference import grpc_service_pb2 as kserve

_FINAL_RESPONSE = "triton_final_response"
_RAW_OUTPUT_CONTENTS = kserve.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_INFER_RESPONSE = kserve.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER

Data = Sequence[Buffer | None]

_PARAMETER_FIELD = {
    "bool_value": "bool_param",
    "int_value": "int64_param",
    "string_value": "string_param",
    "double_value": "double_param",
    "uint_value": "uint64_param",
}


def unary_reply(response: inference_pb2.InferResponse, data: Data, *, request_id: str) -> bytes:
    """The serialized ModelInferResponse to one request that succeeded, with a copy of `data`.

    data: per output its raw bytes; None: they are in the response itself.
    """
    head = _without_elements(response, request_id)
    return joined([head.SerializeToString(), *_elements(response, data)])


def stream_reply(response: inference_pb2.InferResponse, data: Data, *, request_id: str) -> bytes:
    """The same as a serialized ModelStreamInferResponse, which says whether more will follow."""
    head = _without_elements(response, request_id)
    head.parameters[_FINAL_RESPONSE].bool_param = response.final
    pieces = [head.SerializeToString(), *_elements(response, data)]
    return joined(bytes_field(_INFER_RESPONSE, *pieces))


def _without_elements(
    response: inference_pb2.InferResponse, request_id: str
) -> kserve.ModelInferResponse:
    message = kserve.ModelInferResponse(
        model_name=response.model_name,
        model_version=str(response.model_version),
        id=request_id,
    )
    for key, parameter in response.parameters.items():
        form = parameter.WhichOneof("value")
        if form is not None:
            setattr(message.parameters[key], _PARAMETER_FIELD[form], getattr(parameter, form))
    for tensor in response.outputs:
        message.outputs.add(
            name=tensor.name,
            datatype=dtypes.dtype_of_value(tensor.data_type).name,
            shape=tensor.shape,
        )
    return message


def _elements(response: inference_pb2.InferResponse, data: Data) -> list[Buffer]:
    """raw_output_contents in pieces."""
    pieces: list[Buffer] = []
    for tensor, raw in zip(response.outputs, data, strict=True):
        elements = raw if raw is not None else inline_elements(tensor)
        pieces += bytes_field(_RAW_OUTPUT_CONTENTS, elements)
    return pieces


def inline_elements(tensor: tensor_pb2.Tensor) -> Buffer:
    """The raw bytes of a tensor that has its elements in the message."""
    if tensor.HasField("raw"):
        return tensor.raw
    return tensors.bytes_of_array(tensors.array_of_tensor(tensor))


def stream_error(error: ThirdrailError, *, request_id: str) -> bytes:
    """The failure of one request of a stream that goes on: its text, and which it was."""
    message = kserve.ModelStreamInferResponse(
        error_message=status.text_of(error),
        infer_response=kserve.ModelInferResponse(id=request_id),
    )
    return message.SerializeToString()
