# SPDX-License-Identifier: Apache-2.0
"""The channel over which the front tells a worker what to load, and hears how that goes.

One JSON object a line over a SOCK_STREAM socket pair that the worker inherits. Both ends are alike:

    {"id": 7, "do": "load", "with": {...}}                                a call
    {"id": 7, "progress": {...}}                                          any number of these,
    {"id": 7, "ok": {...}}                                                then the answer,
    {"id": 7, "error": {"reason": "REASON_INTERNAL", "message": "..."}}   or this one

The other end is our own code, but a worker runs foreign models: a line that is too long, is not
JSON or makes no sense ends the channel, which for both sides means that the other one is lost. So
does the end of the file. Tensor data never travels here, and what does is small, so nothing is
ever split over lines.
"""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from thirdrail.errors import (
    Internal,
    ResourceExhausted,
    ThirdrailError,
    Unavailable,
    error_of_reason,
)
from thirdrail.v1 import inference_pb2 as pb

Fields = dict[str, Any]
OnProgress = Callable[[Fields], None]
Serve = Callable[[str, Fields, OnProgress], Awaitable[Fields]]

_log = logging.getLogger(__name__)


class ChannelClosed(Unavailable):
    """The other end is gone, or sent what it may not."""


class ProtocolViolation(Exception):
    """The other end sent a line that means nothing."""


@dataclass(frozen=True, slots=True)
class ChannelLimits:
    control_line_bytes_max: int = 16 << 20
    control_calls_max: int = 256  # unanswered, each way

    def __post_init__(self) -> None:
        if self.control_line_bytes_max < 1024 or self.control_calls_max < 1:
            raise ValueError(f"control channel limits are too small: {self}")


@dataclass(slots=True)
class _Call:
    answer: asyncio.Future[Fields]
    on_progress: OnProgress | None


async def _serve_nothing(do: str, _fields: Fields, _progress: OnProgress) -> Fields:
    raise Internal(f"this end of the control channel does not do '{do}'")


@dataclass(slots=True)
class ControlChannel:
    """One end. Use it on one event loop: `await open_channel(...)`, calls, `await close()`.

    serve: what the other end may ask for; it raises thirdrail.errors; anything else is logged, and
        told as a fixed text.
    on_close: called once, when the channel has ended for any reason but our own `close()`.
    lines_heard: from the other end so far.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    limits: ChannelLimits
    serve: Serve = _serve_nothing
    on_close: Callable[[], None] | None = None
    lines_heard: int = 0
    _calls: dict[int, _Call] = field(default_factory=dict)  # unanswered, by number
    _serving: set[asyncio.Task[None]] = field(default_factory=set)
    _calls_made: int = 0
    _closed: bool = False
    _reading: asyncio.Task[None] | None = None
    _room: asyncio.Semaphore = field(init=False)  # for calls of ours

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(self.limits.control_calls_max)

    async def call(
        self, do: str, fields: Fields | None = None, on_progress: OnProgress | None = None
    ) -> Fields:
        """Ask the other end and wait for its answer; at the bound, first for somebody else's.

        Raises the error of thirdrail.errors that the other end answered with, ChannelClosed when
        it is gone, ResourceExhausted when the line gets too long.
        """
        await self._room.acquire()
        try:
            self._require_open()
            number = self._calls_made + 1
            line = self._line({"id": number, "do": do, "with": fields or {}})
        except BaseException:
            self._room.release()
            raise
        self._calls_made = number
        call = _Call(asyncio.get_running_loop().create_future(), on_progress)
        self._calls[number] = call
        try:
            await self._write(line)
            return await call.answer
        finally:
            # Who gives up leaves a call behind that the other end still serves, and that counts.
            if not call.answer.done():
                call.answer.cancel()
            elif not call.answer.cancelled():
                call.answer.exception()  # so that it counts as seen, if nobody waited for it

    async def close(self) -> None:
        """Hang up: the other end sees the end of the file. Our own unanswered calls fail."""
        self._end("the control channel is closed")
        if self._reading is not None:
            self._reading.cancel()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    # Writing

    def _line(self, message: Fields) -> bytes:
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(line) > self.limits.control_line_bytes_max:
            raise ResourceExhausted(
                f"a control message of {len(line)} bytes is longer than the "
                f"{self.limits.control_line_bytes_max} bytes that one may have"
            )
        return line

    def _require_open(self) -> None:
        if self._closed:
            raise ChannelClosed("the control channel is closed")

    async def _write(self, line: bytes) -> None:
        self._require_open()
        self.writer.write(line)
        try:
            await self.writer.drain()
        except ConnectionError:
            raise ChannelClosed("the other end of the control channel is gone") from None

    def _write_progress(self, number: int, fields: Fields) -> None:
        # Late progress is worth nothing: an end that does not keep up misses some, none is stored.
        waiting = self.writer.transport.get_write_buffer_size()
        if not self._closed and waiting < self.limits.control_line_bytes_max:
            self.writer.write(self._line({"id": number, "progress": fields}))

    # Reading

    async def _read(self) -> None:
        reason = "the other end of the control channel is gone"
        try:
            while line := await self._next_line():
                self.lines_heard += 1
                self._take(line)
        except ProtocolViolation as violation:
            reason = f"the other end of the control channel broke its rules: {violation}"
            _log.error("%s; hanging up", reason)
        except Exception:  # or whoever has asked something would wait for ever
            reason = "this end of the control channel failed"
            _log.exception("%s; hanging up", reason)
        self._end(reason)
        if self.on_close is not None:
            self.on_close()

    async def _next_line(self) -> bytes:
        """Empty at the end of the file."""
        try:
            return await self.reader.readline()
        except ConnectionError:
            return b""
        except ValueError:  # StreamReader's word for a line beyond its limit
            limit = self.limits.control_line_bytes_max
            raise ProtocolViolation(f"a line of more than {limit} bytes") from None

    def _take(self, line: bytes) -> None:
        message = _parse(line)
        fields = message.get("with", {})
        match message:
            case {"id": int(number), "do": str(do)} if isinstance(fields, dict):
                self._begin_serving(number, do, fields)
            case {"id": int(number), "progress": dict(progress)}:
                self._take_progress(number, progress)
            case {"id": int(number), "ok": dict(answer)}:
                self._take_answer(number, answer)
            case {"id": int(number), "error": {"reason": str(reason), "message": str(text)}}:
                self._take_answer(number, _error(reason, text))
            case _:
                raise ProtocolViolation(f"a message with the fields {sorted(message)[:8]}")

    def _require_made(self, number: int) -> None:
        if not 0 < number <= self._calls_made:
            raise ProtocolViolation(f"an answer to call {number}, which was never made")

    def _take_progress(self, number: int, progress: Fields) -> None:
        self._require_made(number)
        call = self._calls.get(number)
        if call is not None and call.on_progress is not None and not call.answer.done():
            call.on_progress(progress)

    def _take_answer(self, number: int, answer: Fields | ThirdrailError) -> None:
        self._require_made(number)
        call = self._calls.pop(number, None)
        if call is None:
            return
        self._room.release()
        if call.answer.done():  # whoever asked has given up
            return
        if isinstance(answer, ThirdrailError):
            call.answer.set_exception(answer)
        else:
            call.answer.set_result(answer)

    # Serving

    def _begin_serving(self, number: int, do: str, fields: Fields) -> None:
        if len(self._serving) >= self.limits.control_calls_max:
            raise ProtocolViolation(f"more than {self.limits.control_calls_max} unanswered calls")
        task = asyncio.create_task(self._serve_one(number, do, fields), name=f"control {do}")
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve_one(self, number: int, do: str, fields: Fields) -> None:
        try:
            answer = await self.serve(do, fields, lambda told: self._write_progress(number, told))
            line = self._line({"id": number, "ok": answer})
        except ThirdrailError as error:
            line = self._error_line(number, error)
        except Exception:
            _log.exception("control call '%s' failed", do)
            line = self._error_line(number, Internal(f"'{do}' failed unexpectedly, see the log"))
        try:
            await self._write(line)
        except ChannelClosed:
            _log.debug("nobody is left to hear the answer to '%s'", do)

    def _error_line(self, number: int, error: ThirdrailError) -> bytes:
        reason = pb.Reason.Name(error.reason)
        text = error.message[
            : self.limits.control_line_bytes_max // 16
        ]  # \\u escapes may make it longer
        return self._line({"id": number, "error": {"reason": reason, "message": text}})

    def _end(self, reason: str) -> None:
        if self._closed:
            return
        self._closed = True
        for call in self._calls.values():
            self._room.release()
            if not call.answer.done():
                call.answer.set_exception(ChannelClosed(reason))
        for task in self._serving:
            task.cancel()
        self.writer.close()


async def open_channel(
    sock: socket.socket,
    limits: ChannelLimits,
    *,
    serve: Serve = _serve_nothing,
    on_close: Callable[[], None] | None = None,
) -> ControlChannel:
    """The channel over one end of a SOCK_STREAM Unix socket pair, which it owns from now on."""
    reader, writer = await asyncio.open_unix_connection(
        sock=sock, limit=limits.control_line_bytes_max
    )
    channel = ControlChannel(reader, writer, limits, serve, on_close)
    channel._reading = asyncio.create_task(channel._read(), name="control channel")
    return channel


def _parse(line: bytes) -> Fields:
    if not line.endswith(b"\n"):
        raise ProtocolViolation("a line that ends with the file")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise ProtocolViolation(f"a line that is not JSON: {line[:80]!r}") from None
    if not isinstance(message, dict):
        raise ProtocolViolation("a line that is not a JSON object")
    return message


def _error(reason: str, text: str) -> ThirdrailError:
    try:
        return error_of_reason(pb.Reason.Value(reason), text)
    except ValueError:
        return Internal(f"unknown reason {reason!r}: {text}")
