# SPDX-License-Identifier: Apache-2.0
"""Keeps one worker running: starts it, tells everybody when it died, starts it again after a pause.

What happens to its models is decided elsewhere (restarts.py, model_control.py); this file performs.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from thirdrail.errors import ThirdrailError, Unavailable
from thirdrail.v1 import metrics_pb2
from thirdrail_server.config import ControlLimits
from thirdrail_server.control_channel import (
    ChannelClosed,
    ChannelLimits,
    ControlChannel,
    Fields,
    OnProgress,
    open_channel,
)
from thirdrail_server.control_messages import message_of_text
from thirdrail_server.front.control.restarts import RestartDelay, S
from thirdrail_server.front.control.worker_process import WorkerProcess

_log = logging.getLogger(__name__)


class WorkerDied(Unavailable):
    """The worker died while it was doing what it was asked."""

    def __init__(self, worker: str, how: str) -> None:
        super().__init__(f"worker '{worker}' died: {how}")
        self.how = how  # "signal 11 (SIGSEGV)"


class Lane(Protocol):
    """The front's lane to the worker. Closing it fails what is in flight with UNAVAILABLE."""

    closed: asyncio.Future[str]  # done with the reason, whoever closed it

    def close(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class WorkerNews:
    """Who is told about the worker's life. Both are called on the event loop and return at once."""

    started: Callable[[], None]
    died: Callable[[str], None]  # how, e.g. "signal 11 (SIGSEGV)"


@dataclass(slots=True, eq=False)
class _Life:
    """One worker from its start to its death."""

    process: WorkerProcess
    channel: ControlChannel
    lane: Lane
    death: asyncio.Future[str] = field(
        default_factory=asyncio.Future
    )  # set after the news went out


class Supervisor:
    """A worker that is always there again. `start`, `call` as often as needed, then `stop`."""

    def __init__(
        self,
        name: str,
        start_process: Callable[[], WorkerProcess],
        attach_lane: Callable[[socket.socket], Awaitable[Lane]],
        limits: ControlLimits,
        channel_limits: ChannelLimits,
    ) -> None:
        self.name = name  # "cpu", "cuda:0"
        self.restarts = 0
        self._start_process = start_process
        self._attach_lane = attach_lane
        self._limits = limits
        self._channel_limits = channel_limits
        self._delay = RestartDelay(
            limits.restart_delay_ms_min, limits.restart_delay_ms_max, limits.restart_stable_s
        )
        self._life: _Life | None = None
        self._is_up = asyncio.Event()
        self._is_tried = asyncio.Event()
        self._last_life = asyncio.Event()  # no other worker is started
        self._stopping = asyncio.Event()  # and the one that is there has to go
        self._running: asyncio.Task[None] | None = None

    def start(self, news: WorkerNews) -> None:
        """Start the worker and keep it running. `wait_until_up` says when it is."""
        assert self._running is None, "a supervisor is started once"
        self._running = asyncio.create_task(self._run(news), name=f"supervise {self.name}")

    async def wait_until_up(self) -> None:
        await self._is_up.wait()

    async def wait_until_tried(self) -> None:
        """Until it was up, or failed to start, once."""
        await self._is_tried.wait()

    @property
    def is_up(self) -> bool:
        return self._is_up.is_set()

    async def call(
        self, do: str, fields: Fields | None = None, on_progress: OnProgress | None = None
    ) -> Fields:
        """Ask the worker. Raises what it raised, WorkerDied, Unavailable when there is none."""
        life = self._life
        if life is None:
            raise Unavailable(f"worker '{self.name}' is not running; it is being restarted")
        try:
            answer = await life.channel.call(do, fields, on_progress)
        except ChannelClosed:
            raise await self._death_of(life) from None
        if life.death.done():  # it answered and died before we got to read the answer
            raise await self._death_of(life)
        return answer

    async def ask(self, do: str, fields: Fields | None = None) -> Fields:
        """`call`, for what a sound worker answers at once. Unavailable also where it does not."""
        answer_s_max = self._limits.worker_answer_s_max
        try:
            async with asyncio.timeout(answer_s_max):
                return await self.call(do, fields)
        except TimeoutError:
            raise Unavailable(
                f"worker '{self.name}' has said nothing for {answer_s_max} s"
            ) from None

    async def status(self) -> metrics_pb2.WorkerStatus:
        """Figures of the worker; those that only it knows are 0 while it does not answer."""
        status = metrics_pb2.WorkerStatus()
        with contextlib.suppress(ThirdrailError, ValueError, KeyError):
            answer = await self.ask("status")
            status = message_of_text(metrics_pb2.WorkerStatus, answer["status"])
        status.name = self.name
        status.pid = self._life.process.pid if self._life else 0
        status.is_serving = self.is_up
        status.restarts = self.restarts
        return status

    async def begin_stop(self) -> None:
        """No restart follows any more. A worker that answers nothing is killed: what it has taken
        on would be waited for in vain."""
        self._last_life.set()
        if self._life is not None:
            await self._kill_if_silent(self._life, self._limits.worker_answer_s_max)

    async def stop(self) -> None:
        """End the worker: hang up, wait, and kill it when it takes too long. No restart follows."""
        self._last_life.set()
        self._stopping.set()
        if self._running is not None:
            await self._running

    async def _death_of(self, life: _Life) -> WorkerDied:
        return WorkerDied(self.name, await asyncio.shield(life.death))

    async def _run(self, news: WorkerNews) -> None:
        while not self._last_life.is_set():
            try:
                how = await self._live(news)
            except Exception:  # nobody else would start the worker again
                _log.exception("supervising worker '%s' failed", self.name)
                how = "the front could not supervise it"
            self._is_tried.set()
            if self._stopping.is_set():
                break
            if self._last_life.is_set():
                _log.error("worker '%s' died: %s", self.name, how)
                break
            delay_ns = self._delay.on_death(time.monotonic_ns())
            _log.error(
                "worker '%s' died: %s; restarting in %d ms", self.name, how, delay_ns // 1_000_000
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._last_life.wait(), delay_ns / S)
            self.restarts += 1

    async def _live(self, news: WorkerNews) -> str:
        """One life of the worker. Returns how it ended."""
        try:
            process = self._start_process()
        except OSError as error:
            return f"it cannot be started: {error}"
        channel = await open_channel(process.control, self._channel_limits, on_close=process.kill)
        try:
            lane = await self._greet(process, channel)
            if lane is None:
                return await self._ending(process)
            self._life = _Life(process, channel, lane)
            self._delay.on_start(time.monotonic_ns())
            self._is_up.set()
            self._is_tried.set()
            _log.info("worker '%s' is up, pid %d", self.name, process.pid)
            news.started()
            return await self._until_death(self._life, news)
        finally:
            await channel.close()
            process.kill()
            await process.wait()
            process.lane.close()

    async def _greet(self, process: WorkerProcess, channel: ControlChannel) -> Lane | None:
        """Wait for the first answer and attach the lane. None: the worker is of no use."""
        first_answer = asyncio.create_task(self._first_answer(process, channel))
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({first_answer, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not first_answer.done():
            first_answer.cancel()
        try:
            return await first_answer
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise
        except TimeoutError:
            _log.error("worker '%s' said nothing for %d s", self.name, self._start_s)
        except (ThirdrailError, OSError) as error:
            _log.error("worker '%s' did not start: %s", self.name, error)
        process.kill()
        return None

    async def _first_answer(self, process: WorkerProcess, channel: ControlChannel) -> Lane:
        async with asyncio.timeout(self._start_s):
            await channel.call("status")
            return await self._attach_lane(process.lane)

    @property
    def _start_s(self) -> int:
        return self._limits.worker_start_s_max

    async def _until_death(self, life: _Life, news: WorkerNews) -> str:
        """A worker whose lane has closed cannot be called any more: it ends as well."""
        ended = asyncio.create_task(life.process.wait())
        listening = asyncio.create_task(self._watch_for_silence(life))
        stopping = asyncio.create_task(self._stopping.wait())
        events: set[asyncio.Future[Any]] = {ended, stopping, life.lane.closed}
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        if life.lane.closed.done():
            _log.info("the lane to worker '%s' closed: %s", self.name, life.lane.closed.result())
        stopping.cancel()
        listening.cancel()
        await life.channel.close()
        how = await self._ending(life.process)
        self._life = None
        self._is_up.clear()
        try:
            if not self._stopping.is_set():
                news.died(how)
        finally:  # or whoever has asked it something would wait for ever
            life.death.set_result(how)
            life.lane.close(f"worker '{self.name}' died: {how}")
        await ended
        return how

    async def _watch_for_silence(self, life: _Life) -> None:
        """A process can be there and yet do nothing: stopped, deadlocked, held by one call."""
        silence_s = self._limits.worker_silence_s_max
        while True:
            await asyncio.sleep(silence_s / 3)
            await self._kill_if_silent(life, silence_s)

    async def _kill_if_silent(self, life: _Life, silence_s: int) -> None:
        heard = life.channel.lines_heard
        try:
            async with asyncio.timeout(silence_s):
                await life.channel.call("status")
        except ChannelClosed:
            return
        except (TimeoutError, ThirdrailError):
            pass  # with many calls unanswered, ours waits; and an error is an answer, too
        if life.channel.lines_heard == heard:
            _log.error("worker '%s' said nothing for %d s: killed", self.name, silence_s)
            life.process.kill()

    async def _ending(self, process: WorkerProcess) -> str:
        return await process.stop(self._limits.worker_stop_s_max)
