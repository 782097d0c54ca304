# SPDX-License-Identifier: Apache-2.0
"""Memory on this worker's device that a client of the front owns: KServe's CUDA shared memory.

The front has a region opened before it names it, and closed when none of its requests needs it any
more; it chooses the numbers, and never uses one twice. Nothing orders a client's work on such
memory with ours: as KServe has it, inputs are written before a request is sent, and results are
there when it is answered.

A region that is closed while a copy is under way goes when that copy is done: memory that an owner
freed and we still have mapped is undefined to CUDA, so it is held no longer than that.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from thirdrail import tensors
from thirdrail.errors import Internal, InvalidArgument, NotFound
from thirdrail.tensors import Array
from thirdrail.v1 import tensor_pb2
from thirdrail_engines.engine import DeviceLost, EngineError
from thirdrail_engines.plans import BuildError

if TYPE_CHECKING:
    from thirdrail_engines.cuda.device import Device, PeerMemory, Stream

log = logging.getLogger(__name__)

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE


class DeviceRegions:
    """All that the front had opened, by number. For any thread."""

    def __init__(self, open_device: Callable[[], "Device"]) -> None:
        """open_device: raises BuildError MISSING where there is none."""
        self._open_device = open_device
        self._device: Device | None = None
        self._regions: dict[int, _Region] = {}
        self._lock = threading.Lock()

    def open(self, number: int, handle: bytes, size: int) -> None:
        """Map what `handle` names. Takes long: call it off the loop.

        Raises NotFound where there is no device, InvalidArgument for a handle that is none or
        names less than `size` bytes.
        """
        if len(handle) != HANDLE_BYTES:
            raise InvalidArgument(f"the handle has {len(handle)} bytes, expected {HANDLE_BYTES}")
        device = self._device_here()
        try:
            memory = device.open_peer(handle)
        except EngineError as error:
            raise InvalidArgument(str(error)) from None
        if not 0 < size <= memory.nbytes:
            memory.close()
            raise InvalidArgument(f"the memory has {memory.nbytes} bytes, {size} were registered")
        with self._lock:
            assert number not in self._regions, "the front used a number twice"
            self._regions[number] = _Region(device, memory, size)

    def close(self, number: int) -> None:
        """Also for one that is not open: what was asked for is then the case."""
        with self._lock:
            region = self._regions.pop(number, None)
        if region is not None:
            region.close()

    def part(self, ref: tensor_pb2.RegionRef) -> "RegionPart":
        """Raises NotFound, InvalidArgument."""
        with self._lock:
            region = self._regions.get(ref.region)
        if region is None:
            raise NotFound(f"shared memory region {ref.region} is not open in this worker")
        if ref.offset + ref.size > region.size:
            raise InvalidArgument(
                f"{ref.size} bytes at {ref.offset} are not within a region of {region.size} bytes"
            )
        return RegionPart(region, ref.offset, ref.size)

    def close_all(self) -> None:
        with self._lock:
            regions, self._regions = list(self._regions.values()), {}
        for region in regions:
            region.close()

    def __len__(self) -> int:
        with self._lock:
            return len(self._regions)

    def _device_here(self) -> "Device":
        if self._device is None:
            try:
                self._device = self._open_device()
            except BuildError as error:
                raise NotFound(str(error)) from None
        return self._device


class _Region:
    def __init__(self, device: "Device", memory: "PeerMemory", size: int) -> None:
        """Takes `memory` over."""
        self._device = device
        self._memory = memory
        self.uuid = device.facts.uuid
        self.size = size
        self._lock = threading.Lock()
        self._idle_streams: list[Stream] = []  # as many as there were copies at once
        self._copies = 0
        self._is_closing = False

    @contextlib.contextmanager
    def copying(self) -> Iterator[tuple[int, "Stream"]]:
        """Where it is, and a stream to copy on. Raises InvalidArgument, EngineError, DeviceLost."""
        with self._lock:
            if self._is_closing:
                raise InvalidArgument("the shared memory region was unregistered meanwhile")
            stream = self._idle_streams.pop() if self._idle_streams else self._device.new_stream()
            self._copies += 1
        try:
            yield self._memory.address, stream
        finally:
            with self._lock:
                self._idle_streams.append(stream)
                self._copies -= 1
                try:
                    self._close_if_due()
                except (EngineError, DeviceLost):  # whoever copied has nothing to do with that
                    log.exception("memory of a client cannot be closed")

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            self._close_if_due()

    def _close_if_due(self) -> None:
        if self._is_closing and not self._copies:
            while self._idle_streams:
                self._idle_streams.pop().close()
            self._memory.close()


@dataclass(frozen=True, slots=True)
class RegionPart:
    """The bytes of one tensor in a region. Copies block, and let other threads run meanwhile."""

    _region: _Region
    _offset: int
    size: int

    def is_on(self, uuid: str) -> bool:
        """Whether that device is where it lies."""
        return self._region.uuid == uuid

    @contextlib.contextmanager
    def held(self) -> Iterator[int]:
        """Where it is, for work that is done when this ends. Raises InvalidArgument when the region
        is closed."""
        with self._region.copying() as (address, _):
            yield address + self._offset

    def check_room(self, output: str, nbytes: int) -> None:
        """Raises Internal, as Triton has it, where a result of that size does not fit."""
        if nbytes > self.size:
            raise Internal(
                f"shared memory size specified with the request for output '{output}' ({self.size} "
                f"bytes) should be at least {nbytes} bytes to hold the results"
            )

    def read_into(self, target: Array) -> None:
        """target: contiguous, of `size` bytes. Raises InvalidArgument when the region is closed,
        EngineError, DeviceLost."""
        assert target.nbytes == self.size
        if not self.size:
            return
        with self._region.copying() as (address, stream):
            stream.copy_out(_address(target), address + self._offset, self.size)
            stream.synchronize()

    def write(self, output: str, array: Array) -> None:
        """Put the elements of an output there. Raises what `check_room` and `read_into` raise."""
        data = np.frombuffer(tensors.bytes_of_array(array), np.uint8)
        self.check_room(output, data.nbytes)
        if not data.nbytes:
            return
        with self._region.copying() as (address, stream):
            stream.copy_in(address + self._offset, _address(data), data.nbytes)
            stream.synchronize()


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
