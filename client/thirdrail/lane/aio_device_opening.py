# SPDX-License-Identifier: Apache-2.0
"""A worker's device as it comes over a lane to an event loop: the device itself, then its chunks.

To open it and to map its memory may take long: one thread beside the loop does so, in the order in
which things came. That thread unmaps it too, which waits for the device's work.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from thirdrail.errors import ThirdrailError, error_of_reason
from thirdrail.failures import anew, with_note
from thirdrail.lane.calls import timed_out
from thirdrail.lane.device_chunks import open_device
from thirdrail.lane.device_memory import ATTACH_TIMEOUT_S, DeviceMemory
from thirdrail.lane.packets import sole_fd
from thirdrail.v1 import lane_pb2

T = TypeVar("T")
_Attached = tuple[lane_pb2.DeviceAttached, list[int]]


class DeviceOpening:
    """Of one session.

    send: the session's. grown: told when there is more input memory. fail: ends the session.
    """

    def __init__(
        self,
        send: Callable[[lane_pb2.LaneRequest], None],
        grown: Callable[[], None],
        fail: Callable[[str], None],
    ) -> None:
        self._send = send
        self._grown = grown
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._asking = asyncio.Lock()
        self._question: asyncio.Future[_Attached] | None = None
        self._opened: DeviceMemory | ThirdrailError | None = None  # or why it cannot be, for good
        self._thread: _Thread | None = None
        self._mapping: asyncio.Future[None] | None = None  # of the last chunk that came
        self._ended: ThirdrailError | None = None

    @property
    def memory(self) -> DeviceMemory:
        """After `attach`."""
        assert isinstance(self._opened, DeviceMemory)
        return self._opened

    @property
    def has_ended(self) -> bool:
        return self._ended is not None

    def require_open(self) -> None:
        """Raises why the session has ended."""
        if self._ended is not None:
            raise anew(self._ended)

    async def attach(self, uuid: str) -> None:
        """Ask the worker for its device, which it gives once in a session.

        Raises FailedPrecondition where there is none to get, or this process lacks something;
        InvalidArgument for another device.
        """
        if self._opened is None:
            asking = asyncio.ensure_future(self._ask(uuid))
            # The device is given once: it goes on when nobody waits, or hears of a refusal.
            asking.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                async with asyncio.timeout(ATTACH_TIMEOUT_S):
                    await asyncio.shield(asking)
            except TimeoutError:
                raise timed_out(ATTACH_TIMEOUT_S) from None
        if isinstance(self._opened, ThirdrailError):
            raise anew(self._opened)
        self.memory.require_device(uuid)

    async def _ask(self, uuid: str) -> None:
        """Raises a refusal, after which one may ask again."""
        async with self._asking:
            if self._opened is not None:
                return
            self.require_open()
            self._question = self._loop.create_future()
            request = lane_pb2.DeviceRequest(request=1, uuid=uuid)
            self._send(lane_pb2.LaneRequest(device=request))
            try:
                attached, fds = await self._question
            finally:
                self._question = None
            thread = self._thread = _Thread()
            try:
                chunks = await thread.call(partial(open_device, attached, fds, thread.end))
            except ThirdrailError as error:
                thread.end()
                self._opened = with_note(anew(error))
            else:
                self._opened = DeviceMemory(attached, chunks)

    async def mapped(self) -> None:
        """Until all memory that has come is mapped. Raises why the session has ended meanwhile."""
        mapping = self._mapping
        if mapping is not None and not mapping.done():
            await asyncio.wait([mapping])
            self.require_open()

    # Called by whoever reads

    def on_attached(self, attached: lane_pb2.DeviceAttached, fds: list[int]) -> list[int]:
        """See `AsyncWire._on_answer`."""
        if self._question is None or self._question.done():
            return fds
        status = attached.status
        if status.reason:
            self._question.set_exception(with_note(error_of_reason(status.reason, status.message)))
            return fds
        self._question.set_result((attached, fds))
        return []

    def takes(self, chunk: lane_pb2.Chunk) -> bool:
        return isinstance(self._opened, DeviceMemory) and self._opened.chunks.takes(chunk)

    def on_chunk(self, chunk: lane_pb2.Chunk, fds: list[int]) -> None:
        """Raises ValueError for other than one descriptor."""
        assert self._thread is not None
        self._mapping = self._thread.call(partial(self.memory.chunks.open, chunk, sole_fd(fds)))
        self._mapping.add_done_callback(partial(self._on_mapped, chunk))

    def _on_mapped(self, chunk: lane_pb2.Chunk, mapping: asyncio.Future[None]) -> None:
        try:
            mapping.result()
        except (ValueError, OSError, ThirdrailError) as error:
            return self._fail(f"the worker sent memory that cannot be used: {error}")
        if self.memory.chunks.add_room(chunk):
            self._grown()

    def close(self, error: ThirdrailError) -> None:
        """The session has ended: whoever waits, fails."""
        self._ended = error
        if self._question is not None and not self._question.done():
            self._question.set_exception(anew(error))


class _Thread(threading.Thread):
    """Does work in the order in which it was given."""

    def __init__(self) -> None:
        super().__init__(name="thirdrail-device", daemon=True)  # the process need not wait for it
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.start()

    def run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # and what it holds, whose end may be the next thing to come

    def call(self, work: Callable[[], T]) -> asyncio.Future[T]:
        done: Future[T] = Future()
        done.set_running_or_notify_cancel()  # nobody calls it off
        self._work.put(partial(_settle, done, work))
        return asyncio.wrap_future(done)

    def end(self, last: Callable[[], None] = lambda: None) -> None:
        """After this work. To be called anywhere, in finalisers too: this queue takes no lock, as
        an executor would."""
        self._work.put(last)
        self._work.put(None)


def _settle(done: Future[T], work: Callable[[], T]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
