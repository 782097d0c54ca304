# SPDX-License-Identifier: Apache-2.0
"""What one lane session has on the worker's device: two arenas, a ring of events, and the order.

The rules of the ring are in `event_ring`. A client's events say when it is done; when the device is
done with a call is asked of an event that no client knows, and of whether anybody still holds the
call: one that was cancelled may be about to run all the same. A result that another call reads is
kept until that one is over too, whatever its client releases.
"""

import contextlib
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from thirdrail.v1 import inference_pb2, lane_pb2, tensor_pb2
from thirdrail_engines.cuda.device import Device, Event, Stream
from thirdrail_engines.cuda.event_ring import Action, EventRing, Kind, Reuse, State
from thirdrail_engines.cuda.runs_under_way import stuck
from thirdrail_engines.engine import DeviceLost
from thirdrail_server.config import DeviceLimits
from thirdrail_server.worker.chunks import Charge
from thirdrail_server.worker.device_arenas import DeviceInput, DeviceOutput
from thirdrail_server.worker.device_tensors import DeviceBytes

NS_PER_S = 1_000_000_000
NEVER_NS = 1 << 62

Refs = dict[str, tuple[tensor_pb2.ArenaRef, DeviceBytes]]


@dataclass(slots=True, eq=False, weakref_slot=True)
class DeviceCall:
    """One request's way to the device. Whoever may still run it holds it."""

    device: Device
    stream: Stream  # for copies of the worker's own
    place: int
    work: "_Work"
    out_done: Event
    output: DeviceOutput

    def lease(self, sizes: Mapping[str, int]) -> Refs:
        """Room for results, by name. Once in each run. See DeviceOutput.lease."""
        return self.output.lease(self.place, sizes)

    def give_back(self) -> None:
        """The run failed, and nothing of it is under way: there may be another one."""
        self.output.free(self.place)

    def record_done(self, stream: Stream) -> None:
        """All that this call is for the device was given to the stream. Before the answer."""
        done = self.work.done or self.device.new_event()
        self.work.done = done
        if self.work.run_s_max:
            self.work.end_ns = time.monotonic_ns() + round(self.work.run_s_max * NS_PER_S)
        stream.record(done)
        stream.record(self.out_done)


@dataclass(slots=True, eq=False)
class _Work:
    """What the device has of a call, without holding it. place: whose results are read, too."""

    reads: Sequence[int]
    call: "weakref.ref[DeviceCall] | None" = None
    done: Event | None = None
    end_ns: int = NEVER_NS  # of time.monotonic_ns(): when it must be over
    run_s_max: float = 0.0

    def is_over(self) -> bool:
        """Raises DeviceLost, CudaError."""
        if self.call is not None and self.call() is not None:
            return False
        return self.done is None or self.done.is_done()

    def close(self) -> None:
        done, self.done = self.done, None
        if done is not None:
            done.close()


@dataclass(slots=True)
class _Readers:
    """Of the results in one place, beside the client."""

    works: list[_Work] = field(default_factory=list)

    def are_over(self) -> bool:
        self.works = [work for work in self.works if not work.is_over()]
        return not self.works


class SessionDevice:
    """Lives on the loop; after `stop` it is the janitor's. Places count from 1."""

    def __init__(
        self, device: Device, stream: Stream, limits: DeviceLimits, charge: Charge
    ) -> None:
        """Raises CudaError, DeviceLost. Takes long: not for the loop."""
        self.device = device
        self._stream = stream
        self.limits = limits
        self.input = DeviceInput(device, limits.input_arena_bytes_max, charge)
        self.output = DeviceOutput(device, limits.output_arena_bytes_max, charge, limits.places_max)
        self.events = device.share_events(limits.places_max)
        self._ring = EventRing(1 + limits.places_max)  # place 0 means "no place"
        self._works: dict[int, _Work] = {}  # by place, until it is free
        self._readers = [_Readers() for _ in range(limits.places_max + 1)]

    @property
    def total_bytes(self) -> int:
        return self.input.total_bytes + self.output.total_bytes

    def has(self, epoch: int) -> bool:
        """Whether an epoch is that of an arena on the device."""
        return epoch in (self.input.epoch, self.output.epoch)

    def view(self, name: str, ref: tensor_pb2.ArenaRef) -> DeviceBytes:
        """The bytes that a request's tensor refers to. Raises FailedPrecondition or
        InvalidArgument."""
        arena = self.input if ref.epoch == self.input.epoch else self.output
        return arena.view(name, ref)

    # Calls

    def arrive(self, infer: inference_pb2.InferRequest, deadline_ns: int | None) -> None:
        """A request that was found good came. Raises InvalidArgument for a place that is taken."""
        self._ring.arrive(infer.event_place, infer.call, deadline_ns)

    def begin(self, infer: inference_pb2.InferRequest, run_s_max: float = 0.0) -> DeviceCall:
        """A request whose inputs are ready is about to be given to the device.

        run_s_max: see EngineSpec.
        """
        place = infer.event_place
        refs = [tensor.ref for tensor in infer.inputs if tensor.HasField("ref")]
        reads = sorted({ref.slot for ref in refs if ref.epoch == self.output.epoch})
        work = _Work(reads, run_s_max=run_s_max)
        call = DeviceCall(
            self.device, self._stream, place, work, self.events.out_done[place - 1],
            self.output,
        )  # fmt: skip
        work.call = weakref.ref(call)
        self._works[place] = work
        for read in reads:
            self._readers[read].works.append(work)
        return call

    def answered(self, place: int, *, has_results: bool) -> None:
        """has_results: there are some on the device, which the client will release."""
        if has_results:
            return self._ring.ran(place)
        self.output.release(place)
        self._ring.dropped(place)

    def cancel(self, place: int) -> bool:
        """End a call that still waits for its inputs. False: it does not."""
        return self._ring.cancel(place) is not None

    def release(self, lease: lane_pb2.Lease) -> bool:
        """False: there is no such lease."""
        is_ours = lease.epoch == self.output.epoch
        if not is_ours or not self.output.is_leased(lease.slot, lease.generation):
            return False
        if self._ring.state(lease.slot) is not State.LEASED:
            return False
        self.output.release(lease.slot)
        self._ring.release(lease.slot)
        return True

    # Time

    @property
    def is_idle(self) -> bool:
        """Nothing is to be asked of the device."""
        return self._ring.is_idle

    def tick(self, now_ns: int) -> list[Action]:
        """What is to be done now. Raises DeviceLost, CudaError."""
        actions = self._ring.tick(now_ns, self._is_done)
        for action in actions:
            if isinstance(action, Reuse):
                self._on_free(action.index)
        return actions

    @property
    def has_works(self) -> bool:
        return bool(self._works)

    def check_works(self, now_ns: int) -> None:
        """Raises DeviceLost when the device has not done one in time, whoever waits for it; or when
        it is lost; CudaError."""
        for work in self._works.values():
            if work.end_ns < now_ns and work.done is not None and not work.done.is_done():
                raise stuck(work.run_s_max)

    def _is_done(self, place: int, kind: Kind) -> bool:
        if kind is Kind.IN_READY:
            return self.events.in_ready[place - 1].is_done()
        if kind is Kind.CONSUMED:
            return self.events.consumed[place - 1].is_done()
        work = self._works.get(place)
        return (work is None or work.is_over()) and self._readers[place].are_over()

    def _on_free(self, place: int) -> None:
        self.output.free(place)
        work = self._works.pop(place, None)
        if work is not None:
            for read in work.reads:
                self._readers[read].are_over()
            work.close()

    # Ending

    def stop(self) -> None:
        """The session is over: nothing new begins."""
        self.output.stop()
        self._ring.end()

    def close(self) -> None:
        """Free everything. Raises BufferError while the device, or a run, may still use it.

        Any thread, after `stop`. What a lost device held is gone with it.
        """
        with contextlib.suppress(DeviceLost):
            self.tick(time.monotonic_ns())
            if not self._ring.is_quiet:
                raise BufferError("the device still uses the session's memory")
            self.input.close()
            self.output.give_back()
            self.events.close()
