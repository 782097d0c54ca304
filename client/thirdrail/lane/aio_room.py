# SPDX-License-Identifier: Apache-2.0
"""Getting large inputs into the session's memory, on an event loop.

What lies there already goes by reference. All else is copied once, beside the loop where it is
much. When there is no room the worker is asked for more, and when it may not give any, a call waits
until another one ends. What there is, and whether waiting can help, `session_memory` knows.
"""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from thirdrail.errors import ResourceExhausted, ThirdrailError
from thirdrail.failures import anew
from thirdrail.lane.calls import Checksum
from thirdrail.lane.encoding import LargeInput
from thirdrail.lane.input_arena import COPY_ON_LOOP_BYTES_MAX
from thirdrail.lane.places import Place, Role
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.v1 import lane_pb2


class Room:
    """The input memory of one session, for whoever needs a piece of it.

    request_growth: sends a GrowRequest; the answer arrives by `grown` or `refused`.
    collect: gives back what arrays showed that are gone; whether there was any.
    give_back: for places that nobody took.
    is_debug: inputs that their owner can still write are summed up.
    """

    def __init__(
        self,
        memory: SessionMemory,
        request_growth: Callable[[lane_pb2.GrowRequest], None],
        collect: Callable[[], bool],
        give_back: Callable[[Sequence[Place]], None],
        *,
        is_debug: bool = False,
    ) -> None:
        self._memory = memory
        self._request_growth = request_growth
        self._collect = collect
        self._give_back = give_back
        self._is_debug = is_debug
        self._growing: asyncio.Future[Place | None] | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._ended: ThirdrailError | None = None

    async def refer(
        self, inputs: Sequence[LargeInput], places: list[Place], checksums: list[Checksum]
    ) -> list[bytes]:
        """The inputs as fields of an InferRequest.

        places, checksums: of the call; what it uses is added, also where this fails.
        Raises like `reserve`.
        """
        found = [self._find(each, places, checksums) for each in inputs]
        copied = [each for each, field in zip(inputs, found, strict=True) if field is None]
        if not copied:
            return [field for field in found if field is not None]
        reserved = await self.reserve([each.array.nbytes for each in copied])
        places += reserved
        await self._copy(reserved, copied, places)
        fields = (
            each.encode(place.ref(0, place.size))
            for each, place in zip(copied, reserved, strict=True)
        )
        return [field or next(fields) for field in found]

    def _find(
        self, given: LargeInput, places: list[Place], checksums: list[Checksum]
    ) -> bytes | None:
        """The field of an input that lies in the session's memory already."""
        array = given.array
        is_plain = array.flags.c_contiguous and array.dtype.isnative
        found = self._memory.find(array) if is_plain else None
        if found is None:
            return None
        place, offset = found
        place.users += 1
        places.append(place)
        if self._is_debug and place.role in (Role.INPUT, Role.ALONE):
            memory = place.memory[offset : offset + array.nbytes]
            checksums.append(Checksum.of(given.name, memory))
        return given.encode(place.ref(offset, array.nbytes))

    async def _copy(
        self, places: Sequence[Place], inputs: Sequence[LargeInput], taken: list[Place]
    ) -> None:
        if sum(place.size for place in places) <= COPY_ON_LOOP_BYTES_MAX:
            return _copy_all(places, inputs)
        loop = asyncio.get_running_loop()
        copying = loop.run_in_executor(None, _copy_all, places, inputs)
        try:
            await asyncio.shield(copying)
        except asyncio.CancelledError:
            # The copy cannot be stopped: what the call has taken stays so until it has ended.
            kept = list(taken)
            taken.clear()
            copying.add_done_callback(lambda _: self._give_back(kept))
            raise

    async def reserve(self, sizes: Sequence[int]) -> list[Place]:
        """Pieces for one call, all at once. Raises ResourceExhausted, or why the session ended."""
        while True:
            self._require_open()
            places = self._memory.reserve(sizes)
            if places is not None:
                return places
            if self._collect():
                continue
            size = self._memory.growth_for(sizes)
            if size is None:
                freed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(freed)
                await freed
            elif self._growing is None:
                await self.grow(lane_pb2.GrowRequest(size=size))
            else:
                await self.settle()  # what another call asks for may do for us as well

    async def settle(self) -> None:
        """Until nobody has asked for more memory and waits for it."""
        while self._growing is not None:
            await asyncio.wait([self._growing])

    async def grow(self, request: lane_pb2.GrowRequest) -> Place | None:
        """More memory of the worker; the place of what was asked for alone. One request at a time.

        Raises ResourceExhausted where there is none, or why the session ended.
        """
        await self.settle()
        self._require_open()
        growing = self._growing = asyncio.get_running_loop().create_future()
        self._request_growth(request)
        try:
            return await asyncio.shield(growing)
        except asyncio.CancelledError:
            growing.add_done_callback(self._give_back_unused)
            raise

    def grown(self, place: Place | None) -> None:
        """A chunk of input memory has come; `place`: it was asked for alone."""
        growing, self._growing = self._growing, None
        if growing is not None:
            growing.set_result(place)
        elif place is not None:
            self._give_back([place])

    def refused(self, message: str) -> None:
        """The worker has no more memory for us."""
        growing, self._growing = self._growing, None
        if growing is not None:
            _fail(growing, self._memory.with_holdings(ResourceExhausted(message)))

    def wake(self) -> None:
        """Some memory is free again."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def close(self, error: ThirdrailError) -> None:
        """The session has ended: whoever waits, fails."""
        self._ended = error
        growing, self._growing = self._growing, None
        if growing is not None:
            _fail(growing, anew(error))
        self.wake()

    def _require_open(self) -> None:
        if self._ended is not None:
            raise anew(self._ended)

    def _give_back_unused(self, growing: "asyncio.Future[Place | None]") -> None:
        if growing.exception() is None and (place := growing.result()) is not None:
            self._give_back([place])


def _copy_all(places: Sequence[Place], inputs: Sequence[LargeInput]) -> None:
    for place, each in zip(places, inputs, strict=True):
        native = each.array.dtype.newbyteorder("=")
        np.copyto(place.memory.view(native).reshape(each.array.shape), each.array)


def _fail(future: "asyncio.Future[Place | None]", error: ThirdrailError) -> None:
    future.set_exception(error)
    future.exception()  # retrieved here: nobody may be waiting any more
