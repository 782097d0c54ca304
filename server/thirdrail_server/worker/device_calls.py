# SPDX-License-Identifier: Apache-2.0
"""The requests of one lane session that have tensors on the worker's device.

A request waits in the session's ring until the client's own work has written its inputs; only then
does it join the queue, where it shares batches with others: nobody waits for a mate's client. It is
answered as soon as the device has it, unless the batch has results on the host. Nothing here is on
the path of requests whose tensors are on the host.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from thirdrail.errors import Cancelled, FailedPrecondition, Internal, ThirdrailError, TimedOut
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import tensor_pb2
from thirdrail_engines.cuda.event_ring import Enqueue, Expire
from thirdrail_engines.engine import DeviceLost, EngineError
from thirdrail_server.worker.chunks import Bytes
from thirdrail_server.worker.device_tensors import DeviceBytes
from thirdrail_server.worker.requests import Request, read_request
from thirdrail_server.worker.served_version import ServedVersion
from thirdrail_server.worker.session_device import DeviceCall
from thirdrail_server.worker.session_memory import SessionMemory

LOOK_S = 0.0005  # between two looks at events that somebody waits for
WATCH_S = 0.5  # between two looks at runs that may never end
NOT_ATTACHED = (
    "the request has an event_place, and this session has no device: send a DeviceRequest first"
)


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A good request whose inputs are not ready yet."""

    infer: pb.InferRequest
    request: Request
    served: ServedVersion
    flow: int
    arrived_ns: int
    on_cancel: Callable[["Waiting"], None]

    def cancel(self) -> None:
        """End it with Cancelled."""
        self.on_cancel(self)


class Calls(Protocol):
    """The session's other requests, and its answers."""

    def wait_on_device(self, waiting: Waiting) -> None:
        """It is in flight."""
        ...

    def run_on_device(self, waiting: Waiting, call: DeviceCall) -> None: ...

    def fail_on_device(self, waiting: Waiting, error: ThirdrailError) -> None: ...

    def give_up(self, error: ThirdrailError) -> None:
        """The session must end."""
        ...


class DeviceCalls:
    """From the session's hello to `close`. on_device_lost: told that the process is to end."""

    def __init__(
        self, memory: SessionMemory, calls: Calls, on_device_lost: Callable[[DeviceLost], None]
    ) -> None:
        self._memory = memory
        self._calls = calls
        self._on_device_lost = on_device_lost
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, Waiting] = {}  # by call
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._is_closed = False

    def take(self, infer: pb.InferRequest, served: ServedVersion, flow: int, now_ns: int) -> None:
        """Raises FailedPrecondition, InvalidArgument for a request that is not good."""
        device = self._memory.device
        if device is None:
            raise FailedPrecondition(NOT_ATTACHED)
        request = read_request(infer, served.spec, self._view)
        deadline_ns = now_ns + infer.timeout_us * 1000 if infer.timeout_us else None
        device.arrive(infer, deadline_ns)
        waiting = Waiting(infer, request, served, flow, now_ns, self._cancel)
        self._waiting[infer.call] = waiting
        self._calls.wait_on_device(waiting)
        self.tick()

    def _view(self, name: str, ref: tensor_pb2.ArenaRef) -> Bytes | DeviceBytes:
        device = self._memory.device
        assert device is not None
        return device.view(name, ref) if device.has(ref.epoch) else self._memory.view(name, ref)

    def answered(self, place: int, *, has_results: bool) -> None:
        """The answer of a request that ran, or was to run, goes out next."""
        device = self._memory.device
        assert device is not None
        device.answered(place, has_results=has_results)
        self._memory.send_new_device_chunks()
        self._look_later()

    def released(self) -> None:
        """There is something to look for."""
        self._look_later()

    def tick(self) -> None:
        """Act on what events say by now."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()  # or each tick beside it would begin another chain of them
        device = self._memory.device
        if device is None or self._is_closed:
            return None
        now_ns = time.monotonic_ns()
        try:
            for action in device.tick(now_ns):
                if isinstance(action, Enqueue):
                    waiting = self._waiting.pop(action.call)  # type: ignore[call-overload]
                    call = device.begin(waiting.infer, waiting.served.run_s_max)
                    self._calls.run_on_device(waiting, call)
                    self._watch_works()
                elif isinstance(action, Expire):
                    self._expire(self._waiting.pop(action.call), now_ns)  # type: ignore[call-overload]
        except DeviceLost as error:
            return self._on_device_lost(error)
        except EngineError as error:
            return self._calls.give_up(Internal(f"the session's events cannot be read: {error}"))
        self._look_later()

    def _watch_works(self) -> None:
        if self._watch is None and not self._is_closed:
            self._watch = self._loop.call_later(WATCH_S, self._check_works)

    def _check_works(self) -> None:
        """Whether the device has done in time what its clients were told it has."""
        self._watch = None
        device = self._memory.device
        if device is None or not device.has_works:
            return None
        try:
            device.check_works(time.monotonic_ns())
        except DeviceLost as error:
            return self._on_device_lost(error)
        except EngineError as error:
            return self._calls.give_up(Internal(f"the session's events cannot be read: {error}"))
        self._watch_works()

    def _expire(self, waiting: Waiting, now_ns: int) -> None:
        passed_ms = (now_ns - waiting.arrived_ns) / 1e6
        error = TimedOut(
            f"its inputs on the device were not ready after {passed_ms:.1f} ms: the event in_ready "
            f"of place {waiting.infer.event_place} is not done"
        )
        self._calls.fail_on_device(waiting, error)

    def _cancel(self, waiting: Waiting) -> None:
        device = self._memory.device
        if self._waiting.pop(waiting.infer.call, None) is None or device is None:
            return
        device.cancel(waiting.infer.event_place)
        self._calls.fail_on_device(waiting, Cancelled("the request was cancelled"))

    def _look_later(self) -> None:
        device = self._memory.device
        if self._timer is None and device is not None and not device.is_idle:
            self._timer = self._loop.call_later(LOOK_S, self.tick)

    def close(self) -> None:
        """Nobody waits any more."""
        self._is_closed = True
        self._waiting.clear()
        for timer in (self._timer, self._watch):
            if timer is not None:
                timer.cancel()
