# SPDX-License-Identifier: Apache-2.0
"""How often a session's events are looked at while its requests wait for them."""

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

from thirdrail.device.twin import TwinCounters
from thirdrail.dtypes import BY_NAME
from thirdrail.tensors import TensorSpec
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import tensor_pb2
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_server.config import DeviceLimits
from thirdrail_server.worker.chunks import charge_nothing
from thirdrail_server.worker.device_calls import DeviceCalls
from thirdrail_server.worker.session_device import SessionDevice
from thirdrail_server.worker.version_spec import VersionSpec

PLACES = 8
SPEC = VersionSpec("m", 1, {"x": TensorSpec("x", BY_NAME["FP32"], (-1,))}, {}, 0, frozenset(), {})


async def test_one_timer_looks_for_all_requests_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = TwinDevice()
    stream = twin.new_stream()
    device = SessionDevice(twin, stream, DeviceLimits(places_max=PLACES), charge_nothing)
    chunk = device.input.grow(32)
    theirs, ours = device.events.export()
    os.close(ours)
    ready = TwinCounters.open(theirs, 2 * PLACES, writable=True)
    memory: Any = SimpleNamespace(device=device)
    session: Any = SimpleNamespace(wait_on_device=lambda waiting: None)
    served: Any = SimpleNamespace(spec=SPEC)
    calls = DeviceCalls(memory, session, lambda error: None)
    timers: list[asyncio.TimerHandle] = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def note(*args: Any) -> asyncio.TimerHandle:
        timers.append(call_later(*args))
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", note)
    for place in range(1, PLACES + 1):
        ready.record(place - 1)  # and never done
        infer = pb.InferRequest(call=place, event_place=place)
        ref = tensor_pb2.ArenaRef(epoch=device.input.epoch, size=32)
        infer.inputs.add(name="x", data_type=tensor_pb2.DATA_TYPE_FP32, shape=[8]).ref.CopyFrom(ref)
        calls.take(infer, served, 0, 0)
    assert sum(not timer.cancelled() for timer in timers) == 1
    calls.close()
    assert all(timer.cancelled() for timer in timers)
    chunk.close()
    device.stop()
    device.close()
    stream.close()
    twin.close()
