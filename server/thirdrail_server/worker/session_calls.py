# SPDX-License-Identifier: Apache-2.0
"""The calls of one lane session: to the models, and back as packets. Every call ends exactly once:
with a response, or with the session.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from thirdrail.errors import (
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ThirdrailError,
    Unavailable,
)
from thirdrail.lane import packets
from thirdrail.lane.outbox import Outbox
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2
from thirdrail_server.config import LaneLimits
from thirdrail_server.worker.calls import Call, Ending
from thirdrail_server.worker.device_calls import DeviceCalls, Waiting
from thirdrail_server.worker.device_regions import DeviceRegions
from thirdrail_server.worker.members import Member
from thirdrail_server.worker.models import ModelTable
from thirdrail_server.worker.repeats import Repeat, Repeats
from thirdrail_server.worker.requests import Request, no_part, read_request
from thirdrail_server.worker.served_version import OnDeviceLost, ServedVersion
from thirdrail_server.worker.session_device import DeviceCall
from thirdrail_server.worker.session_memory import SessionMemory
from thirdrail_server.worker.version_spec import VersionSpec

log = logging.getLogger(__name__)

_INFER_KEY = bytes((2 << 3 | 2,))  # of LaneResponse's field `infer` in the wire format
# A response that carries nothing but these two fits a packet, whatever characters they consist of.
ERROR_TEXT_CHARS_MAX = 4096
REQUEST_ID_CHARS_MAX = 1024
STOPPING = "the server is stopping"


@dataclass(frozen=True, slots=True)
class _BoundModel:
    name: str
    version: int


class SessionCalls:
    """From the hello to `close`.

    is_front: the peer says whose each request is, for fair turns among its own callers, and may
        refer to regions.
    """

    def __init__(
        self,
        models: ModelTable,
        limits: LaneLimits,
        outbox: Outbox,
        memory: SessionMemory,
        *,
        is_front: bool,
        regions: DeviceRegions,
        give_up: Callable[[ThirdrailError], None],
        on_device_lost: OnDeviceLost,
    ) -> None:
        """give_up: ends the session."""
        self.total = 0  # since the hello
        self._models = models
        self._limits = limits
        self._outbox = outbox
        self._memory = memory
        self._is_front = is_front
        self._part_of = regions.part if is_front else no_part
        self._loop = asyncio.get_running_loop()
        self._repeats = Repeats()
        self._in_flight: dict[int, Call | Waiting] = {}
        self._model_ids: dict[int, _BoundModel] = {}
        self._in_flight_max = limits.calls_in_flight_max
        self._is_stopping = False
        self._is_closed = False
        self.give_up = give_up
        self.on_device = DeviceCalls(memory, self, on_device_lost)

    def __len__(self) -> int:
        """How many are in flight."""
        return len(self._in_flight)

    def cancel(self, number: int) -> None:
        call = self._in_flight.get(number)
        if call is not None:
            call.cancel()

    def stop(self) -> None:
        """Refuse new ones; those in flight finish."""
        self._is_stopping = True
        self._in_flight_max = 0  # so that a call costs no further look

    def close(self) -> None:
        """Cancel what is in flight; nobody will be answered."""
        self._is_closed = True
        self.on_device.close()
        calls, self._in_flight = self._in_flight, {}
        for call in list(calls.values()):  # a thread that ran one may take it out meanwhile
            call.cancel()

    def repeat(self, packet: bytes) -> bool:
        """Take a packet that is like an earlier one. False: it must be read like any other."""
        repeat = self._repeats.find(packet)
        request = repeat.read(packet) if repeat is not None else None
        if repeat is None or request is None:
            return False
        now_ns = time.monotonic_ns()
        try:
            served = self._models.find(repeat.model_name, repeat.model_version)
            if served.spec is not repeat.spec:
                self._repeats.forget(packet)
                return False
            self._count_in(request.call)
        except ThirdrailError as error:
            self._respond_failure(request.call, request.request_id, repeat.model_name, error)
        else:
            self._run(request, served, repeat, repeat.flow, now_ns)
        return True

    def take(self, message: lane_pb2.LaneRequest, packet: bytes) -> None:
        """A request, which is answered now or later. packet: what `message` was read from."""
        infer, now_ns = message.infer, time.monotonic_ns()
        try:
            self._count_in(infer.call)
            if len(infer.request_id) > REQUEST_ID_CHARS_MAX:
                raise InvalidArgument(
                    f"a request id takes at most {REQUEST_ID_CHARS_MAX} characters, got "
                    f"{len(infer.request_id)}"
                )
            model = self._model_of(infer)
            served = self._models.find(model.name, model.version)
            if infer.event_place:
                return self.on_device.take(infer, served, message.flow, now_ns)
            request = read_request(infer, served.spec, self._memory.view, self._part_of)
        except ThirdrailError as error:
            return self._respond_failure(infer.call, infer.request_id, infer.model_name, error)
        except Exception:
            if infer.event_place:  # it may be under way: no second answer
                raise
            log.exception("a request could not be read", extra={"request_id": infer.request_id})
            fault = Internal("the worker could not read the request; its log says why")
            return self._respond_failure(infer.call, infer.request_id, infer.model_name, fault)
        self._repeats.remember(packet, message, request, served.spec)
        self._run(request, served, infer, message.flow, now_ns)

    def _count_in(self, number: int) -> None:
        self.total += 1
        if number in self._in_flight:
            raise InvalidArgument(f"call {number} is in flight already")
        if len(self._in_flight) >= self._in_flight_max:
            if self._is_stopping:
                raise Unavailable(STOPPING)
            raise ResourceExhausted(
                f"{len(self._in_flight)} calls are in flight in this session, the most it may have"
            )

    def _run(
        self,
        request: Request,
        served: ServedVersion,
        wishes: pb.InferRequest | Repeat,
        flow: int,
        now_ns: int,
    ) -> None:
        member = Member(request, self._memory.output, self._limits.inline_bytes_max)
        ending = served.run_now(member, priority=wishes.priority, now_ns=now_ns)
        if ending is not None:
            return self._respond(request, served.spec, ending)
        call = Call(member, served, self._on_ended, now_ns, self._on_run)
        self._in_flight[request.call] = call
        served.submit(
            call,
            flow=(id(self), flow if self._is_front else 0),
            priority=wishes.priority,
            timeout_us=wishes.timeout_us,
            now_ns=now_ns,
        )

    def _model_of(self, message: pb.InferRequest) -> _BoundModel:
        """By name, by id, or by both, which binds the id."""
        if not message.model_id:
            return _BoundModel(message.model_name, message.model_version)
        if message.model_name:
            if (
                len(self._model_ids) >= self._limits.model_ids_max
                and message.model_id not in self._model_ids
            ):
                raise ResourceExhausted(
                    f"{len(self._model_ids)} model ids are bound in this session, the most allowed"
                )
            bound = _BoundModel(message.model_name, message.model_version)
            self._model_ids[message.model_id] = bound
            return bound
        try:
            return self._model_ids[message.model_id]
        except KeyError:
            raise NotFound(f"model id {message.model_id} is not bound in this session") from None

    def _on_ended(self, call: Call, ending: Ending) -> None:
        if self._is_closed:
            return ending.outcome.discard()
        request = call.member.request
        self._in_flight.pop(request.call, None)
        self._respond(request, call.served.spec, ending)

    def _on_run(self, call: Call, ending: Ending) -> None:
        """On an instance thread: answer here and now. The way over the loop takes another switch
        of threads, which is longer than many runs."""
        if self._is_closed:
            return ending.outcome.discard()
        request = call.member.request
        self._in_flight.pop(request.call, None)
        packet = self._packet_of(request, call.served.spec, ending)
        with self._outbox.lock:
            is_sent = not self._memory.has_new_chunks and self._outbox.send_now(packet)
        if not is_sent:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the session
                self._loop.call_soon_threadsafe(self._send, packet)

    # With tensors on the device: see DeviceCalls

    def wait_on_device(self, waiting: Waiting) -> None:
        self._in_flight[waiting.request.call] = waiting

    def run_on_device(self, waiting: Waiting, device_call: DeviceCall) -> None:
        request, served = waiting.request, waiting.served
        member = Member(request, self._memory.output, self._limits.inline_bytes_max, device_call)
        call = Call(member, served, self._on_ended_on_device, waiting.arrived_ns)
        self._in_flight[request.call] = call
        now_ns, timeout_us = time.monotonic_ns(), waiting.infer.timeout_us
        if timeout_us:  # it counts from the arrival, the wait for company from now on
            timeout_us = max(1, timeout_us - (now_ns - waiting.arrived_ns) // 1000)
        served.submit(
            call,
            flow=(id(self), waiting.flow if self._is_front else 0),
            priority=waiting.infer.priority,
            timeout_us=timeout_us,
            now_ns=now_ns,
        )

    def fail_on_device(self, waiting: Waiting, error: ThirdrailError) -> None:
        self._in_flight.pop(waiting.request.call, None)
        passed_ns = time.monotonic_ns() - waiting.arrived_ns
        waiting.served.statistics.request_failed(error, passed_ns)
        if not self._is_closed:
            request, model = waiting.request, waiting.served.spec.model
            self._respond_failure(request.call, request.request_id, model, error)

    def _on_ended_on_device(self, call: Call, ending: Ending) -> None:
        if self._is_closed:
            return ending.outcome.discard()
        request, device_call = call.member.request, call.member.device
        assert device_call is not None
        self._in_flight.pop(request.call, None)
        packet = self._packet_of(request, call.served.spec, ending)
        has_results = ending.outcome.error is None and any(
            output.on_device for output in request.outputs
        )
        self.on_device.answered(device_call.place, has_results=has_results)
        self._send(packet)

    def _respond(self, request: Request, spec: VersionSpec, ending: Ending) -> None:
        self._send(self._packet_of(request, spec, ending))

    def _send(self, packet: bytes) -> None:
        self._memory.send_new_chunks()
        self._outbox.send(packet)

    def _packet_of(self, request: Request, spec: VersionSpec, ending: Ending) -> bytes:
        outcome = ending.outcome
        if outcome.error is not None:
            return self._failure_of(request.call, request.request_id, spec.model, outcome.error)
        response = outcome.response
        response.call = request.call
        if request.request_id:
            response.request_id = request.request_id
        response.final = True
        response.model_name = spec.model
        response.model_version = spec.version
        timing = response.timing
        timing.queue_ns = ending.queue_ns
        timing.input_copy_ns = ending.input_copy_ns
        timing.compute_ns = ending.compute_ns
        timing.output_copy_ns = ending.output_copy_ns
        if spec.batch_rows_max:
            timing.batch_rows = ending.batch_rows
        timing.transport = "lane"
        timing.copies = outcome.copies
        # As a field of LaneResponse, without a copy of the response made for it.
        body = response.SerializeToString()
        packet = _INFER_KEY + packets.varint(len(body)) + body
        if len(packet) <= self._limits.packet_bytes_max:
            return packet
        error = ResourceExhausted(
            f"the response without its tensors has {len(packet)} bytes, a packet of the lane "
            f"takes {self._limits.packet_bytes_max}; ask for fewer outputs, or for raw ones"
        )
        outcome.fail(error)
        return self._failure_of(request.call, request.request_id, spec.model, error)

    def _respond_failure(
        self, call: int, request_id: str, model: str, error: ThirdrailError
    ) -> None:
        self._outbox.send(self._failure_of(call, request_id, model, error))

    def _failure_of(self, call: int, request_id: str, model: str, error: ThirdrailError) -> bytes:
        request_id = request_id[:REQUEST_ID_CHARS_MAX]
        if not self._is_front:  # which logs its own callers' failures
            _log_failure(request_id, model, error)
        message = error.message
        if len(message) > ERROR_TEXT_CHARS_MAX:
            message = f"{message[:ERROR_TEXT_CHARS_MAX]}..."
        status = pb.Status(reason=error.reason, message=message)
        response = pb.InferResponse(call=call, request_id=request_id, final=True, status=status)
        return lane_pb2.LaneResponse(infer=response).SerializeToString()


def _log_failure(request_id: str, model: str, error: ThirdrailError) -> None:
    """At the usual level only what we are at fault for: callers who err are told, and could
    otherwise fill the log."""
    reason = pb.Reason.Name(error.reason).removeprefix("REASON_")
    fields = {"request_id": request_id, "model": model, "reason": reason}
    level = logging.WARNING if isinstance(error, Internal) else logging.DEBUG
    log.log(level, "a request failed: %s", error.message, extra=fields)
