# SPDX-License-Identifier: Apache-2.0
"""What one run at a time has on the device: memory for inputs and outputs, and events."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from thirdrail.tensors import TensorSpec
from thirdrail_engines.cuda.device import Device, Event
from thirdrail_engines.cuda.layout import lay_out
from thirdrail_engines.cuda.open_output import GrowingOutput
from thirdrail_engines.engine import EngineError
from thirdrail_engines.plans import Shape

if TYPE_CHECKING:
    from thirdrail_engines.cuda.instance import Instance


class Slot:
    def __init__(self, instance: "Instance", device: Device, sizes: tuple[int, int]) -> None:
        """sizes: of the blocks for inputs and outputs. Raises OutOfDeviceMemory."""
        self.instance = instance
        self._device = device
        self._blocks: list[int] = []
        self.rooms: dict[str, GrowingOutput] = {}
        self._events: list[Event] = []
        self.output_bytes = sizes[1]
        try:
            for _ in range(3):
                self._events.append(device.new_event())
            for size in sizes:
                self._blocks.append(device.allocate(size))
        except EngineError:
            self.close()
            raise
        self.is_in, self.is_computed, self.is_out = self._events

    def begin(self) -> None:
        """A run begins on this thread, by a library that uses the device as well: what the last one
        told of open outputs is no longer so."""
        self._device.make_current()
        for room in self.rooms.values():
            room.begin()

    @property
    def input_block(self) -> int:
        return self._blocks[0]

    @property
    def output_block(self) -> int:
        return self._blocks[1]

    def room(self, name: str, bytes_max: int) -> GrowingOutput:
        if name not in self.rooms:
            self.rooms[name] = GrowingOutput(self._device, bytes_max)
        return self.rooms[name]

    def sources(
        self, outputs: tuple[TensorSpec, ...], shapes: Mapping[str, Shape]
    ) -> dict[str, int]:
        """Where each output of the last run is: open ones have rooms, the others lie in a block."""
        rooms = {name: room.address for name, room in self.rooms.items() if room.is_told}
        closed = {name: shape for name, shape in shapes.items() if name not in rooms}
        offsets = lay_out(outputs, closed).offsets
        return rooms | {name: self.output_block + offset for name, offset in offsets.items()}

    def close(self) -> None:
        for room in self.rooms.values():
            room.close()
        for block in self._blocks:
            self._device.free(block)
        for event in self._events:
            event.close()
