# SPDX-License-Identifier: Apache-2.0
"""What came back from the dispatcher becomes a ModelInferResponse, or one message of a stream.

Tensors always leave as raw_output_contents, one entry per output and in the same order; `contents`
is never used, and an output without elements has an empty entry.
"""

from collections.abc import Sequence

from thirdrail import dtypes, tensors
from thirdrail.dtypes import Buffer
from thirdrail.errors import ThirdrailError
from thirdrail.v1 import inference_pb2, tensor_pb2
from thirdrail_server.front.kserve import status
from thirdrail_server.inference import grpc_service_pb2 as kserve

_FINAL_RESPONSE = "triton_final_response"

_PARAMETER_FIELD = {
    "bool_value": "bool_param",
    "int_value": "int64_param",
    "string_value": "string_param",
    "double_value": "double_param",
    "uint_value": "uint64_param",
}


def kserve_response(
    response: inference_pb2.InferResponse,
    data: Sequence[Buffer | None],
    *,
    request_id: str,
) -> kserve.ModelInferResponse:
    """The reply to one request that succeeded. The bytes of `data` are copied into it.

    data: per output its raw bytes; None: they are in the response itself.
    """
    message = kserve.ModelInferResponse(
        model_name=response.model_name,
        model_version=str(response.model_version),
        id=request_id,
    )
    for key, parameter in response.parameters.items():
        form = parameter.WhichOneof("value")
        if form is not None:
            setattr(message.parameters[key], _PARAMETER_FIELD[form], getattr(parameter, form))
    for tensor, raw in zip(response.outputs, data, strict=True):
        message.outputs.add(
            name=tensor.name,
            datatype=dtypes.dtype_of_value(tensor.data_type).name,
            shape=tensor.shape,
        )
        elements = raw if raw is not None else _inline_elements(tensor)
        message.raw_output_contents.append(bytes(elements))  # bytes(x) of bytes is x itself
    return message


def _inline_elements(tensor: tensor_pb2.Tensor) -> Buffer:
    if tensor.HasField("raw"):
        return tensor.raw
    return tensors.bytes_of_array(tensors.array_of_tensor(tensor))


def stream_response(
    message: kserve.ModelInferResponse, *, is_final: bool
) -> kserve.ModelStreamInferResponse:
    """One message of a stream. is_final: no further response to the same request follows."""
    message.parameters[_FINAL_RESPONSE].bool_param = is_final
    return kserve.ModelStreamInferResponse(infer_response=message)


def stream_error(error: ThirdrailError, *, request_id: str) -> kserve.ModelStreamInferResponse:
    """The failure of one request of a stream that goes on: its text, and which it was."""
    return kserve.ModelStreamInferResponse(
        error_message=status.text_of(error),
        infer_response=kserve.ModelInferResponse(id=request_id),
    )
