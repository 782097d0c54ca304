# SPDX-License-Identifier: Apache-2.0
"""Requests as bytes, without building a message for each: what repeats is kept serialized.

A caller sends the same model, options, names, types and shapes again and again; only elements
differ. A protobuf field that comes twice counts as its last value, and messages that are joined
merge (protobuf.dev, "Encoding", "Last One Wins"), so a request is the bytes of its parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from thirdrail import dtypes
from thirdrail.dtypes import BYTES, DType
from thirdrail.errors import InvalidArgument
from thirdrail.lane.packets import varint
from thirdrail.models import ModelDescription
from thirdrail.option_values import cannot_be_sent, require_text
from thirdrail.requests import InferOptions, write_options
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2, tensor_pb2

PARTS_KEPT_MAX = 1024
_LISTS = (tuple, list)
_PLAIN = (int, float, type(None))

# Keys of fields in the wire format: number << 3 | type.
_REQUEST_ID_KEY = bytes((5 << 3 | 2,))
_INPUTS_KEY = bytes((6 << 3 | 2,))
_RAW_KEY = bytes((4 << 3 | 2,))  # of Tensor
_REF_KEY = bytes((6 << 3 | 2,))


class _Header(NamedTuple):
    """What an array's name, dtype and shape say."""

    tensor: bytes  # Tensor's name, data_type and shape
    inline: bytes  # everything before the elements of a tensor that travels in the packet
    nbytes: int  # of the elements; -1: BYTES
    dtype: DType
    is_native: bool


@dataclass(slots=True)
class LargeInput:
    """An input that goes by reference. The array may be strided or of foreign byte order; BYTES are
    in their wire form.
    """

    name: str
    header: bytes
    array: Array

    def encode(self, ref: tensor_pb2.ArenaRef) -> bytes:
        """As a field of InferRequest."""
        place = ref.SerializeToString()
        size = len(self.header) + 1 + len(varint(len(place))) + len(place)
        return b"".join(
            (_INPUTS_KEY, varint(size), self.header, _REF_KEY, varint(len(place)), place)
        )


class Encoder:
    """Writes requests. Several threads may use it at once: whatever they keep is the same."""

    def __init__(self) -> None:
        self._options: dict[object, bytes] = {}
        self._headers: dict[tuple[str, np.dtype[Any], tuple[int, ...]], _Header] = {}

    def options(
        self, model: str, description: ModelDescription | None, options: InferOptions
    ) -> bytes:
        """The part of an InferRequest before its inputs.

        Raises InvalidArgument for values that cannot be sent, TypeError for an unknown option.
        """
        key = _key_of_options(model, options)
        part = self._options.get(key)
        if part is None:
            request = inference_pb2.InferRequest()
            repeated = options.copy()
            repeated.pop("request_id", None)
            write_options(request, model, description, **repeated)
            part = request.SerializeToString()
            if key is not None:
                _keep(self._options, key, part)
        request_id = options.get("request_id")
        if not request_id:
            return part
        require_text("request_id", request_id)
        try:
            text = request_id.encode()
        except UnicodeEncodeError as error:
            raise cannot_be_sent(error) from None
        return part + _REQUEST_ID_KEY + varint(len(text)) + text

    def inputs(
        self, arrays: Mapping[str, Array], inline_bytes_max: int
    ) -> tuple[list[bytes], list[LargeInput]]:
        """The inputs that travel in the packet as its parts, and those that are too large for that.

        Raises InvalidArgument for an array whose elements cannot be sent.
        """
        parts: list[bytes] = []
        large: list[LargeInput] = []
        left = inline_bytes_max
        try:
            for name, array in arrays.items():
                header = self._headers.get((name, array.dtype, array.shape)) or self._header(
                    name, array
                )
                if 0 <= header.nbytes <= left:
                    left -= header.nbytes
                    parts.append(header.inline)
                    parts.append(array.tobytes() if header.is_native else _native(array).tobytes())
                    continue
                if header.nbytes >= 0:
                    large.append(LargeInput(name, header.tensor, array))
                    continue
                data = dtypes.encode_bytes(array.ravel().tolist())
                if len(data) > left:
                    large.append(LargeInput(name, header.tensor, np.frombuffer(data, np.uint8)))
                    continue
                left -= len(data)
                parts.append(_inline(header.tensor, len(data)))
                parts.append(data)
        except InvalidArgument as error:
            raise InvalidArgument(f"input '{name}': {error}") from None
        return parts, large

    def _header(self, name: str, array: Array) -> _Header:
        require_text("the name of an input", name)
        dtype = dtypes.dtype_of_array(array)
        tensor = tensor_pb2.Tensor(
            name=name, data_type=dtype.value, shape=array.shape
        ).SerializeToString()
        if dtype is BYTES:
            header = _Header(tensor, b"", -1, dtype, True)
        else:
            inline = _inline(tensor, array.nbytes)
            header = _Header(tensor, inline, array.nbytes, dtype, array.dtype.isnative)
        _keep(self._headers, (name, array.dtype, array.shape), header)
        return header


def _key_of_options(model: str, options: InferOptions) -> object:
    """Equal for equal parts. None: not to be kept. A request id differs each time: it is not in."""
    if type(model) is not str:
        return None  # refused when it is written
    if not options:
        return model
    if options.get("parameters") or (options.get("classes") and not options.get("outputs")):
        return None
    outputs = options.get("outputs") or ()
    apart = ("outputs", "request_id", "parameters", "borrow")  # the last two say nothing here
    others = [item for item in options.items() if item[0] not in apart]
    if type(outputs) not in _LISTS or any(type(name) is not str for name in outputs):
        return None
    if any(type(value) not in _PLAIN for _, value in others):
        return None  # perhaps equal to what is plain, and yet to be refused when it is written
    return (model, tuple(outputs), *others)


def _native(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("="))


def _keep(kept: dict[Any, Any], key: object, value: object) -> None:
    if len(kept) >= PARTS_KEPT_MAX:
        kept.clear()
    kept[key] = value


def _inline(tensor: bytes, nbytes: int) -> bytes:
    raw = _RAW_KEY + varint(nbytes)
    return _INPUTS_KEY + varint(len(tensor) + len(raw) + nbytes) + tensor + raw
