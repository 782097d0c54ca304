# SPDX-License-Identifier: Apache-2.0
"""Exporting and importing tensors over a lane, on an event loop."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from thirdrail.errors import FailedPrecondition, ThirdrailError, error_of_reason
from thirdrail.failures import anew, with_note
from thirdrail.lane.calls import timed_out
from thirdrail.lane.exports import (
    ANSWER_S_MAX,
    SharedTensor,
    array_to_export,
    copy_into,
    export_request,
    forbid_writing,
    place_to_export,
    session_has_ended,
    show_imported,
    text_of_token,
    token_of_text,
)
from thirdrail.lane.input_arena import COPY_ON_LOOP_BYTES_MAX
from thirdrail.lane.places import Place
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.tensors import Array
from thirdrail.v1 import lane_pb2

_Answer = lane_pb2.Exported | lane_pb2.Revoked | SharedTensor


class AsyncExport:
    """A tensor that another process may have.

    token: its text, for one `receive`; whoever has it can take the tensor. The other process must
        run as the user that it is for.
    copies: of the tensor's bytes that the export took.
    """

    def __init__(self, exports: "AsyncExports", token: str, number: int, copies: int) -> None:
        self.token = token
        self.copies = copies
        self._exports = exports
        self._number = number

    async def revoke(self) -> None:
        """Take it back, and from whomever it was handed on to: their requests that refer to it are
        refused from now on. May be called twice.

        Raises FailedPrecondition when the session that exported it has ended.
        """
        await self._exports.revoke(self._number)

    def __repr__(self) -> str:
        return f"<AsyncExport {self._number}, copies {self.copies}>"  # the token is a secret


class AsyncExports:
    """Of one session.

    settle: memory was shown, or is to go back.
    """

    def __init__(
        self,
        memory: SessionMemory,
        *,
        send: Callable[[lane_pb2.LaneRequest], None],
        reserve_alone: Callable[[int], Awaitable[Place]],
        leave: Callable[[Sequence[Place]], None],
        give_back: Callable[[Sequence[Place]], None],
        settle: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._send = send
        self._reserve_alone = reserve_alone
        self._leave = leave
        self._give_back = give_back
        self._settle = settle
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Future[_Answer]] = {}
        self._ended: ThirdrailError | None = None

    async def export(self, value: Any, uid: int | None, lifetime: float) -> AsyncExport:
        """See `AsyncClient.export`."""
        array = array_to_export(value)
        found = place_to_export(self._memory, array)
        if found is not None:
            found[0].users += 1  # until the answer comes
        place, offset = found or (await self._copied(array), 0)
        try:
            answer = await self._ask(export_request(place, offset, array, uid, lifetime))
        finally:
            self._leave([place])
        assert isinstance(answer, lane_pb2.Exported)
        if found is not None:
            forbid_writing(value, place)
        token, copies = text_of_token(answer.token), answer.copies + (found is None)
        return AsyncExport(self, token, answer.export_id, copies)

    async def _copied(self, array: Array) -> Place:
        """The array in a chunk of its own."""
        place = await self._reserve_alone(max(1, array.nbytes))
        if array.nbytes <= COPY_ON_LOOP_BYTES_MAX:
            copy_into(place, array)
            return place
        loop = asyncio.get_running_loop()
        copying = loop.run_in_executor(None, copy_into, place, array)
        try:
            await asyncio.shield(copying)
        except asyncio.CancelledError:  # the copy goes on all the same
            copying.add_done_callback(lambda _: self._leave([place]))
            raise
        return place

    async def receive(self, token: str) -> SharedTensor:
        """See `AsyncClient.receive`."""
        request = lane_pb2.ImportRequest(token=token_of_text(token))
        shared = await self._ask(lane_pb2.LaneRequest(import_tensor=request))
        assert isinstance(shared, SharedTensor)
        return shared

    async def revoke(self, number: int) -> None:
        revoke = lane_pb2.RevokeRequest(export_id=number)
        try:
            await self._ask(lane_pb2.LaneRequest(revoke=revoke))
        except ThirdrailError:
            if self._ended is None:
                raise
            raise FailedPrecondition(session_has_ended(self._ended.message)) from None

    async def _ask(self, message: lane_pb2.LaneRequest) -> _Answer:
        """The answer, or the error that it is. Raises the session's error when it ends."""
        if self._ended is not None:
            raise anew(self._ended)
        number = next(self._numbers)
        getattr(message, message.WhichOneof("message") or "").request = number
        future: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._open[number] = future
        try:
            self._send(message)
            async with asyncio.timeout(ANSWER_S_MAX):
                return await future
        except TimeoutError:
            raise timed_out(ANSWER_S_MAX) from None
        finally:
            self._open.pop(number, None)
            del future  # see AsyncSession._response

    # Called by whoever reads

    def on_answer(self, kind: str, message: lane_pb2.LaneResponse, fds: list[int]) -> list[int]:
        """See `AsyncWire._on_answer`."""
        body: Any = getattr(message, kind, None)
        if kind == "revoked" and message.revoked.epoch:
            self._memory.revoked.add(message.revoked.epoch)
        elif kind in ("exported", "imported", "revoked"):
            future = self._open.get(body.request)
            if future is not None and not future.done():
                return self._answer(future, body, fds)
            if kind == "imported" and not body.status.reason:  # who asked for it has given up
                self._memory.drops.append((body.epoch, 0))
                self._settle()
        return fds

    def _answer(
        self,
        future: "asyncio.Future[_Answer]",
        body: lane_pb2.Exported | lane_pb2.Imported | lane_pb2.Revoked,
        fds: list[int],
    ) -> list[int]:
        if not isinstance(body, lane_pb2.Revoked) and body.status.reason:
            future.set_exception(
                with_note(error_of_reason(body.status.reason, body.status.message))
            )
        elif isinstance(body, lane_pb2.Imported):
            try:
                future.set_result(show_imported(self._memory, body, fds, self))
            except ThirdrailError as error:
                future.set_exception(error)
            self._settle()
            return []
        else:
            future.set_result(body)
        return fds

    def close(self, error: ThirdrailError) -> None:
        """The session has ended: whoever waits, fails."""
        self._ended = error
        for future in self._open.values():
            if not future.done():
                future.set_exception(anew(error))

    # The session of a tensor that was received: see `exports.Session`

    def is_revoked(self, epoch: int) -> bool:
        return epoch in self._memory.revoked

    def give_back(self, place: Place) -> None:
        self._give_back([place])
