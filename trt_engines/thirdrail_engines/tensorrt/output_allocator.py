# SPDX-License-Identifier: Apache-2.0
"""How TensorRT asks for the memory of a result whose size only the run tells."""

from collections.abc import Sequence

from thirdrail_engines.cuda.program import OpenOutput
from thirdrail_engines.tensorrt import native as t


class Rooms:
    """Passes TensorRT's questions on to the room that is bound at present."""

    def __init__(self) -> None:
        self.bound: dict[str, OpenOutput] = {}

    def reserve(self, name: str, nbytes: int) -> int:
        room = self.bound.get(name)
        return room.reserve(max(nbytes, 1)) if room is not None else 0

    def tell(self, name: str, shape: Sequence[int]) -> None:
        room = self.bound.get(name)
        if room is not None:
            room.tell(tuple(map(int, shape)))


def make_output_allocator(trt: t.Module, rooms: Rooms) -> t.IOutputAllocator:
    """It must live as long as the context that uses it."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            return rooms.reserve(name, size)

        def reallocate_output_async(
            self, name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            return rooms.reserve(name, size)

        def notify_shape(self, name: str, shape: Sequence[int]) -> None:
            rooms.tell(name, shape)

    return Allocator()
