# SPDX-License-Identifier: Apache-2.0
"""Lane sessions with memory on a twin, within this process: what a run gets of their requests."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from support.sessions import Session
from support.twin_runs import wait_until
from thirdrail import dtypes
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_engines.cuda.event_ring import Enqueue, State
from thirdrail_engines.cuda.twin import TwinDevice, TwinStream
from thirdrail_server.config import DeviceLimits
from thirdrail_server.worker.chunks import charge_nothing
from thirdrail_server.worker.members import Member, Outcome
from thirdrail_server.worker.requests import read_request
from thirdrail_server.worker.session_device import SessionDevice
from thirdrail_server.worker.version_spec import VersionSpec

ALIGNMENT_BYTES = 256
LIMITS = DeviceLimits(places_max=8, input_arena_bytes_max=2 << 20, output_arena_bytes_max=2 << 20)


@dataclass(slots=True)
class DeviceSession:
    """A caller with memory on the host and on the device."""

    twin: TwinDevice
    limits: DeviceLimits = LIMITS
    host: Session = field(default_factory=Session)
    device: SessionDevice = field(init=False)
    _stream: TwinStream = field(init=False)
    _input_end: int = 0

    def __post_init__(self) -> None:
        self._stream = self.twin.new_stream()
        self.device = SessionDevice(self.twin, self._stream, self.limits, charge_nothing)
        self.device.input.grow(1 << 20)

    def put(self, array: Array) -> tensor_pb2.ArenaRef:
        """Write it on the device."""
        ref = tensor_pb2.ArenaRef(
            epoch=self.device.input.epoch, offset=self._input_end, size=array.nbytes
        )
        self._bytes(ref)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._input_end += -(-max(array.nbytes, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return ref

    def member(
        self,
        spec: VersionSpec,
        on_device: Mapping[str, Array],
        on_host: Mapping[str, Array] | None = None,
        outputs: Sequence[str] = (),
    ) -> Member:
        """A request whose inputs lie there and here, and whose results of these names stay there:
        it is about to be given to the device."""
        place = self._free_place()
        message = self.host.message(on_host or {}, call=place)
        message.event_place = place
        for name, array in on_device.items():
            dtype = dtypes.dtype_of_array(array).value
            tensor = message.inputs.add(name=name, data_type=dtype, shape=array.shape)
            tensor.ref.CopyFrom(self.put(array))
        message.outputs.extend(
            pb.RequestedOutput(name=name, on_device=name in outputs) for name in spec.outputs
        )
        request = read_request(message, spec, self.device.view)
        self.device.arrive(message, None)
        (action,) = self.device.tick(time.monotonic_ns())
        assert isinstance(action, Enqueue)
        call = self.device.begin(message)
        return Member(request, self.host.output, self.host.inline_bytes_max, call)

    def arrays(self, outcome: Outcome) -> dict[str, Array]:
        """What came of it, when the device is done. Raises the outcome's error."""
        if outcome.error is not None:
            raise outcome.error
        return {tensor.name: self._array(tensor) for tensor in outcome.outputs}

    def _array(self, tensor: tensor_pb2.Tensor) -> Array:
        if not self.is_on_device(tensor):
            return self.host.array(tensor)
        self.device.events.out_done[tensor.ref.slot - 1].wait()
        dtype = dtypes.dtype_of_value(tensor.data_type).numpy
        assert dtype is not None
        return self._bytes(tensor.ref).view(dtype).reshape(tuple(tensor.shape)).copy()

    def is_on_device(self, tensor: tensor_pb2.Tensor) -> bool:
        return tensor.HasField("ref") and self.device.has(tensor.ref.epoch)

    def end(self, member: Member, outcome: Outcome) -> None:
        """Answer it, and have its results released."""
        assert member.device is not None
        place, member.device = member.device.place, None
        refs = [each.ref for each in outcome.outputs if self.is_on_device(each)]
        self.device.answered(place, has_results=bool(refs))
        if refs:
            ref = refs[0]
            lease = lane_pb2.Lease(epoch=ref.epoch, slot=ref.slot, generation=ref.generation)
            assert self.device.release(lease)

    def settle(self) -> None:
        """Wait until nothing is left of its calls. What its requests wrote may be written over."""

        def is_idle() -> bool:
            self.device.tick(time.monotonic_ns())
            return self.device.is_idle and not self.device.has_works

        wait_until(is_idle)
        assert not any(slot.is_taken for slot in self.device.output._slots[1:])
        self._input_end = 0

    def close(self) -> None:
        self.settle()
        self.device.stop()
        self.device.close()
        self._stream.close()
        self.host.close()

    def _free_place(self) -> int:
        ring = self.device._ring
        return next(
            place
            for place in range(1, self.limits.places_max + 1)
            if ring.state(place) is State.FREE
        )

    def _bytes(self, ref: tensor_pb2.ArenaRef) -> Array:
        memory = self.device.view("", ref)
        return self.twin.memory_at(memory.address, memory.size, "")
