# SPDX-License-Identifier: Apache-2.0
"""A session's part of the worker's device, at the client's end: which place and memory is whose.

The rules of order are in docs/lane.md, section 17. Both clients use it; here is no socket, and
nobody waits. Memory and places go back when arrays are collected, which is only noted then:
finalisers may run anywhere. Whoever asks for something next gives back what `take_returned` has.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from thirdrail.device.arrays import Block, DeviceArray, DeviceResult
from thirdrail.dtypes import BYTES, dtype_of_array, dtype_of_value, extent
from thirdrail.errors import Internal, InvalidArgument, ResourceExhausted
from thirdrail.failures import with_note
from thirdrail.lane.device_chunks import DeviceChunks
from thirdrail.lane.results import private_output, private_outputs
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.tensors import Array, element_count
from thirdrail.v1 import inference_pb2, lane_pb2, tensor_pb2

ATTACH_TIMEOUT_S = 30.0  # a device that nobody used yet is opened for it

Inputs = Mapping[str, Array | DeviceArray]


@dataclass(frozen=True, slots=True)
class Piece:
    """Of input memory, to be freed in the chunks' allocator."""

    chunk: int
    offset: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A result's memory. `consumed` of its place is to be recorded on the stream; then the lease is
    to be sent, at once and not with the next packet: the place may be the next request's, and is
    free from then on.
    """

    place: int
    stream: int
    lease: lane_pb2.Lease


Returned = Piece | Slot


class _Watch(weakref.ref[Block]):
    """Tells, by a deque's append, when nothing shows a block any more."""

    __slots__ = ("returned",)
    returned: Returned


@dataclass(slots=True)
class _Lease:
    """A result's memory on the device."""

    block: Block
    watch: _Watch
    collected: "deque[_Watch]"

    def release(self) -> None:
        """What was read until now was given to the block's stream."""
        self.block.is_released = True
        self.collected.append(self.watch)


class DeviceMemory:
    """Safe to use from several threads, but for the allocator of its chunks."""

    def __init__(self, attached: lane_pb2.DeviceAttached, chunks: DeviceChunks) -> None:
        self.uuid = attached.uuid
        self.chunks = chunks
        self.runtime = chunks.runtime
        self.place_count = attached.places
        self._places = deque(range(1, attached.places + 1))  # free ones, the longest first
        self._lock = threading.Lock()
        self._watches: set[_Watch] = set()
        self._collected: deque[_Watch] = deque()
        self._unclaimed: deque[Slot] = deque()

    def require_device(self, uuid: str) -> None:
        """Raises InvalidArgument for another device than this one. uuid: or a beginning of one."""
        if not self.uuid.lower().startswith(uuid.lower()):  # as the worker compares
            raise InvalidArgument(
                f"this session's worker computes on {self.uuid}, not on {uuid[:80]!a}"
            )

    # Places

    @property
    def places_free(self) -> int:
        return len(self._places)

    def take_place(self) -> int:
        """Raises ResourceExhausted where results and requests hold all of them."""
        try:
            return self._places.popleft()
        except IndexError:
            raise with_note(
                ResourceExhausted(
                    f"results on the device, or requests in flight, hold all {self.place_count} "
                    "places of this session; let go of some results"
                )
            ) from None

    def leave_place(self, place: int) -> None:
        """It is free again."""
        self._places.append(place)

    # What goes back

    @property
    def is_shown(self) -> bool:
        """Whether something will go back."""
        return bool(self._watches or self._unclaimed)

    def take_returned(self) -> Iterator[Returned]:
        """What goes back now: of arrays that are gone, and of answers that nobody took."""
        while self._unclaimed or self._collected:
            try:
                yield self._unclaimed.popleft() if self._unclaimed else self._take_collected()
            except IndexError:  # another thread was faster, or it was given back already
                continue

    def put_back(self, slot: Slot) -> None:
        """It could not be given back yet."""
        self._unclaimed.appendleft(slot)

    def _take_collected(self) -> Returned:
        """Raises IndexError for nothing new."""
        watch = self._collected.popleft()
        with self._lock:
            if watch not in self._watches:
                raise IndexError
            self._watches.discard(watch)
        return watch.returned

    def _watch(self, block: Block, returned: Returned) -> _Watch:
        watch = _Watch(block, self._collected.append)
        watch.returned = returned
        with self._lock:
            self._watches.add(watch)
        return watch

    # Inputs

    def input_array(
        self, piece: tuple[int, int], shape: tuple[int, ...], dtype: "np.dtype[Any]", stream: int
    ) -> DeviceArray:
        """piece: chunk and offset that the allocator gave; it goes back with the array."""
        chunks, epoch = self.chunks, self.chunks.input_epoch
        ref = tensor_pb2.ArenaRef(epoch=epoch, chunk=piece[0], offset=piece[1])
        block = Block(chunks, self.runtime, chunks.address(epoch, *piece), stream, ref)
        self._watch(block, Piece(*piece))
        return DeviceArray(block, 0, shape, dtype)

    def take_inputs(
        self, head: inference_pb2.InferRequest, inputs: Inputs, stream: int
    ) -> dict[str, Array]:
        """Adds those on the device to the request, and has the stream come after what wrote them.

        Returns the others. Raises InvalidArgument for an array of another session,
        FailedPrecondition for one that was released.
        """
        arrays: dict[str, Array] = {}
        for name, value in inputs.items():
            if isinstance(value, DeviceArray):
                head.inputs.append(self._device_input(name, value, stream))
            else:
                arrays[name] = value
        return arrays

    def _device_input(self, name: str, array: DeviceArray, stream: int) -> tensor_pb2.Tensor:
        block, nbytes = array.block, array.nbytes
        if block.owner is not self.chunks:
            raise InvalidArgument(f"input '{name}' is an array of another session")
        offset = array.address - block.address  # raises for one that was released
        self.runtime.join(stream, block.stream)
        dtype = dtype_of_array(cast("Array", array))
        tensor = tensor_pb2.Tensor(name=name, data_type=dtype.value, shape=array.shape)
        tensor.ref.CopyFrom(block.ref)
        tensor.ref.offset += offset
        tensor.ref.size = nbytes
        return tensor

    # Answers

    def result_of(
        self, response: inference_pb2.InferResponse, place: int, stream: int, host: SessionMemory
    ) -> DeviceResult:
        """The stream has still to wait for `out_done`. Raises the request's error."""
        on_device = [tensor.ref for tensor in response.outputs if self._is_on_device(tensor)]
        if not on_device:
            self.leave_place(place)
            return DeviceResult(response, private_outputs(response, host))
        ref = on_device[0]  # of one slot, as all of them
        block = Block(self.chunks, self.runtime, self.chunks.result_address(ref), stream, ref)
        watch = self._watch(block, Slot(place, stream, _lease_of(ref)))
        arrays: dict[str, Any] = {}
        for tensor in response.outputs:
            if self._is_on_device(tensor):
                arrays[tensor.name] = self._device_array(tensor, block)
            else:
                arrays[tensor.name] = private_output(tensor, host)
        return DeviceResult(response, arrays, _Lease(block, watch, self._collected))

    def recover(
        self,
        response: inference_pb2.InferResponse | None,
        place: int,
        host: SessionMemory | None,
    ) -> None:
        """Nobody takes this answer. None: there is none, since the request was not sent.

        host: takes back what the answer has there; None: that was done.
        """
        outputs = () if response is None else response.outputs
        leases: list[lane_pb2.Lease] = []
        for tensor in outputs:
            if self._is_on_device(tensor):
                leases.append(_lease_of(tensor.ref))
            elif host is not None and tensor.HasField("ref"):
                host.releases.add_lease(_lease_of(tensor.ref), tensor.ref.size)
        if leases:
            self._unclaimed.append(Slot(place, 0, leases[0]))
        else:
            self.leave_place(place)

    def _is_on_device(self, tensor: tensor_pb2.Tensor) -> bool:
        return tensor.ref.epoch == self.chunks.output_epoch

    def _device_array(self, tensor: tensor_pb2.Tensor, block: Block) -> DeviceArray:
        dtype = dtype_of_value(tensor.data_type)
        count = element_count(tensor.name, tensor.shape)
        if dtype.numpy is None or dtype is BYTES or tensor.ref.size != count * dtype.itemsize:
            raise Internal(f"the server's answer cannot be read: '{tensor.name}' is no such tensor")
        offset = self.chunks.result_address(tensor.ref) - block.address
        return DeviceArray(block, offset, tuple(tensor.shape), dtype.numpy)


def device_extent(
    shape: Sequence[int] | int, dtype: npt.DTypeLike
) -> tuple[tuple[int, ...], "np.dtype[Any]", int]:
    """See `extent`. Raises InvalidArgument for text, too."""
    dims, wanted, nbytes = extent(shape, dtype)
    if wanted.hasobject:
        raise InvalidArgument(f"{wanted} cannot lie on a device")
    return dims, wanted, nbytes


def _lease_of(ref: tensor_pb2.ArenaRef) -> lane_pb2.Lease:
    return lane_pb2.Lease(epoch=ref.epoch, slot=ref.slot, generation=ref.generation)
