# SPDX-License-Identifier: Apache-2.0
"""The memory that the contexts on a device compute in, shared by all of them.

A run holds a room while it is given to the device, no longer: who gets the room next is ordered
after it on the device, by an event. So no two runs use the same bytes at once, whatever their
threads do, and no thread waits for the device. Where the order cannot be had, nobody gets a room
any more: the device counts as lost.

Rooms are made when models are loaded, and go when none of the models needs them.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thirdrail_engines.cuda.activation_rooms import (
    Contexts,
    RoomState,
    best_room,
    change_of,
    room_sizes,
)
from thirdrail_engines.engine import DeviceLost, EngineError

if TYPE_CHECKING:
    from thirdrail_engines.cuda.device import Device, Event, Stream


@dataclass(slots=True, eq=False)
class _Room:
    address: int
    nbytes: int
    is_done: "Event"  # recorded behind the last run that was given to it
    stream: "Stream | None" = None  # that run's
    turn: int = 0
    is_lent: bool = False


class Activations:
    """Of one device. For any thread."""

    def __init__(self, device: "Device") -> None:
        self._device = device
        self._models: list[Contexts] = []
        self._rooms: list[_Room] = []
        self._turn = 0
        self._loss: DeviceLost | None = None
        self._changing = threading.Lock()  # which rooms there are
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        with self._changed:
            return sum(room.nbytes for room in self._rooms)

    def join(self, nbytes: int, count: int) -> "Share":
        """Room for a model of so many contexts, each of which needs `nbytes`; 0 for none.

        Raises OutOfDeviceMemory, CudaError, DeviceLost; then nothing has changed.
        """
        contexts = Contexts(nbytes, count)
        with self._changing:
            self._change([*self._models, contexts])
        return Share(self, contexts)

    def leave(self, contexts: Contexts) -> None:
        """None of them runs any more. Raises CudaError, DeviceLost."""
        with self._changing:
            models = list(self._models)
            models.remove(contexts)
            self._change(models)

    def _change(self, models: list[Contexts]) -> None:
        change = change_of([room.nbytes for room in self._rooms], room_sizes(models))
        surplus = [self._rooms[number] for number in change.surplus]
        new = self._made(change.new)
        with self._changed:
            self._models = models
            self._rooms += new
            self._changed.notify_all()
        for room in surplus:
            with self._changed:
                self._changed.wait_for(lambda room=room: not room.is_lent)  # type: ignore[misc]
                self._rooms.remove(room)
            room.is_done.wait()
            self._free(room)

    def _made(self, sizes: tuple[int, ...]) -> list[_Room]:
        made: list[_Room] = []
        try:
            for size in sizes:
                is_done = self._device.new_event()
                try:
                    made.append(_Room(self._device.allocate(size), size, is_done))
                except BaseException:
                    is_done.close()
                    raise
        except BaseException:
            for room in made:
                self._free(room)
            raise
        return made

    def _free(self, room: _Room) -> None:
        self._device.free(room.address)
        room.is_done.close()

    @contextlib.contextmanager
    def lent(self, nbytes: int, stream: "Stream") -> Iterator[int]:
        """The address of that much memory, for what is given to the stream in here.

        Raises EngineError, DeviceLost.
        """
        room = self._taken(nbytes, stream)
        try:
            if room.stream is not stream:
                stream.wait(room.is_done)
        except BaseException:  # it stays ordered after those who had it before
            self._back(room)
            raise
        room.stream = stream
        try:
            yield room.address
        finally:
            try:
                self._order_behind(room, stream)
            finally:
                self._back(room)

    def _taken(self, nbytes: int, stream: "Stream") -> _Room:
        with self._changed:
            while True:
                if self._loss is not None:
                    raise self._loss
                free = [room for room in self._rooms if not room.is_lent]
                found = best_room([self._state(room, stream) for room in free], nbytes)
                if found is not None:
                    break
                self._changed.wait()
            self._turn += 1
            free[found].turn, free[found].is_lent = self._turn, True
            return free[found]

    def _state(self, room: _Room, stream: "Stream") -> RoomState:
        is_own = room.stream is stream
        return RoomState(room.nbytes, is_own, is_own or room.is_done.is_done(), room.turn)

    def _order_behind(self, room: _Room, stream: "Stream") -> None:
        try:
            stream.record(room.is_done)
        except EngineError:
            self._wait_for(stream)
        except DeviceLost as error:
            self._loss = error
            raise

    def _wait_for(self, stream: "Stream") -> None:
        try:
            stream.synchronize()
        except (EngineError, DeviceLost) as error:
            self._loss = DeviceLost(
                f"the device was lost: nothing tells when it is done with shared memory: {error}"
            )
            raise self._loss from None

    def _back(self, room: _Room) -> None:
        with self._changed:
            room.is_lent = False
            self._changed.notify_all()


class Share:
    """What a model has of them."""

    def __init__(self, activations: Activations, contexts: Contexts) -> None:
        self._activations = activations
        self._contexts = contexts
        self._is_closed = False

    @contextlib.contextmanager
    def lent(self, stream: "Stream") -> Iterator[int]:
        """See Activations.lent; 0 for a model that needs none."""
        if not self._contexts.nbytes:
            yield 0
            return
        with self._activations.lent(self._contexts.nbytes, stream) as address:
            yield address

    def close(self) -> None:
        """Once or more often. Raises CudaError, DeviceLost."""
        if not self._is_closed:
            self._is_closed = True
            self._activations.leave(self._contexts)
