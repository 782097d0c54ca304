# SPDX-License-Identifier: Apache-2.0
"""From a response to a result: arrays of the caller's own, or views of the session's memory.

What a caller did not ask to borrow is copied out of its slot, which goes back at once: results can
be kept for as long as anybody likes.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from thirdrail.dtypes import BY_VALUE, BYTES, Buffer, dtype_of_value
from thirdrail.errors import (
    Internal,
    InvalidArgument,
    ThirdrailError,
    Unimplemented,
    error_of_reason,
)
from thirdrail.lane.places import Bytes, Place
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.requests import Result
from thirdrail.tensors import Array, array_of_bytes, array_of_tensor
from thirdrail.v1 import inference_pb2, tensor_pb2

GiveBack = Callable[[Sequence[Place]], None]


@dataclass(slots=True)
class BorrowedOutputs:
    """The slots that a result's arrays show."""

    places: list[Place]
    give_back: GiveBack

    def release(self) -> None:
        """Give the slots back, also those whose arrays somebody still has."""
        self.give_back(self.places)


def has_failed(response: inference_pb2.InferResponse) -> bool:
    return bool(response.status.reason) or not response.final


def failure_of(response: inference_pb2.InferResponse, memory: SessionMemory) -> ThirdrailError:
    """Why the request failed. To be raised as it is: a variable of a frame that raises it would be
    a cycle of the error and its frames, which keeps the caller's arrays until the collector comes.
    """
    status = response.status
    if status.reason:
        return memory.with_holdings(error_of_reason(status.reason, status.message))
    return Unimplemented(f"model '{response.model_name}' answers in parts, expected one answer")


def private_result(response: inference_pb2.InferResponse, memory: SessionMemory) -> Result:
    """A result with arrays of its own. See `private_outputs`."""
    return Result(response, private_outputs(response, memory))


def private_outputs(
    response: inference_pb2.InferResponse, memory: SessionMemory
) -> dict[str, Array]:
    """A response's outputs as arrays of their own. Its slots go back, whatever happens.

    Needs no lock. Raises the request's error, and Internal for a response that makes no sense.
    """
    arrays: dict[str, Array] = {}
    leased_bytes = 0
    try:
        if has_failed(response):
            raise failure_of(response, memory)
        for tensor in response.outputs:
            raw = tensor.raw
            if raw:
                arrays[tensor.name] = _array_of_raw(tensor, raw)
            else:
                leased_bytes += tensor.ref.size
                arrays[tensor.name] = _private_array(tensor, memory)
    except BaseException as error:
        release_outputs(response, memory)
        if isinstance(error, InvalidArgument):
            raise _unreadable(response, error) from None
        raise
    if leased_bytes:
        release_outputs(response, memory)
    return arrays


def private_output(tensor: tensor_pb2.Tensor, memory: SessionMemory) -> Array:
    """One of them alone, whose slot goes back."""
    array = _private_array(tensor, memory)
    if tensor.HasField("ref"):
        memory.releases.add(
            tensor.ref.epoch, tensor.ref.slot, tensor.ref.generation, tensor.ref.size
        )
    return array


def borrowed_result(
    response: inference_pb2.InferResponse, memory: SessionMemory, give_back: GiveBack
) -> Result:
    """A result with views of its slots. Guard it by the lane's lock.

    give_back: called with the result's places when it is released.
    Raises like `private_result`.
    """
    places: list[Place] = []
    arrays: dict[str, Array] = {}
    try:
        if has_failed(response):
            raise failure_of(response, memory)
        for tensor in response.outputs:
            dtype = dtype_of_value(tensor.data_type)
            if not tensor.HasField("ref") or dtype is BYTES:
                arrays[tensor.name] = _private_array(tensor, memory)
                continue
            place = memory.output_place(tensor.ref)
            # Looked at before it is shown: a tensor that makes no sense leaves nothing behind.
            array_of_bytes(tensor.name, dtype, tensor.shape, place.memory.data)
            assert dtype.numpy is not None
            shown = memory.shown.show(place, writable=False)
            places.append(place)
            arrays[tensor.name] = shown.view(dtype.numpy).reshape(tuple(tensor.shape))
    except ThirdrailError as error:
        for place in places:
            memory.shown.forget(place)
        release_outputs(response, memory)
        raise _unreadable(response, error) from None
    held = {(place.slot, place.generation) for place in places}
    release_outputs(response, memory, except_for=held)
    return Result(response, arrays, BorrowedOutputs(places, give_back) if places else None)


def release_outputs(
    response: inference_pb2.InferResponse,
    memory: SessionMemory,
    *,
    except_for: AbstractSet[tuple[int, int]] = frozenset(),
) -> None:
    """Give back the slots of a response, except for some by slot and generation. Needs no lock."""
    for tensor in response.outputs:
        if tensor.HasField("ref"):
            ref = tensor.ref
            if (ref.slot, ref.generation) not in except_for:
                memory.releases.add(ref.epoch, ref.slot, ref.generation, ref.size)


def _private_array(tensor: tensor_pb2.Tensor, memory: SessionMemory) -> Array:
    if not tensor.HasField("ref"):
        return _read_only(array_of_tensor(tensor))
    data: Bytes = memory.output_bytes(tensor.ref)
    dtype = dtype_of_value(tensor.data_type)
    view = array_of_bytes(tensor.name, dtype, tensor.shape, data.data)
    if dtype is BYTES:
        return _read_only(view)
    array = np.empty(view.shape, view.dtype)
    np.copyto(array, view)
    return _read_only(array)


def _array_of_raw(tensor: tensor_pb2.Tensor, raw: Buffer) -> Array:
    """The usual case in few steps; what is not usual is left to `array_of_bytes`."""
    dtype = BY_VALUE.get(tensor.data_type)
    if dtype is not None and dtype is not BYTES and dtype.numpy is not None:
        try:
            array: Array = np.ndarray(tuple(tensor.shape), dtype.numpy, raw)
        except (ValueError, TypeError):
            pass
        else:
            if array.nbytes == len(raw):
                return array
    return _read_only(
        array_of_bytes(tensor.name, dtype_of_value(tensor.data_type), tensor.shape, raw)
    )


def _read_only(array: Array) -> Array:
    if array.flags.writeable:
        array.flags.writeable = False
    return array


def _unreadable(response: inference_pb2.InferResponse, error: ThirdrailError) -> ThirdrailError:
    """The same error where it is the request's own, else one that blames the server."""
    if response.status.reason or not isinstance(error, InvalidArgument):
        return error
    return Internal(f"the server's answer cannot be read: {error}")
