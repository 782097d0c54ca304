# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom on a device: by events between two processes, never by the host."""

import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from support.device_peer import DevicePeer, on_device
from support.lane_peer import Request, infer
from support.worker import RunningWorker
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2

X = np.arange(1, 9, dtype=np.float32)
MODEL = "twin_double"


@pytest.fixture
def closed(gate: Path) -> Iterator[Path]:
    """The device computes nothing until the file is gone."""
    gate.touch()
    yield gate
    gate.unlink(missing_ok=True)


def is_silent(peer: DevicePeer) -> bool:
    """Whether nothing comes for as long as the worker needs to look at its events many times."""
    return not select.select([peer.sock], [], [], 0.05)[0]


def response(peer: DevicePeer) -> pb.InferResponse:
    while (message := peer.receive()).WhichOneof("message") == "chunk":
        pass
    return message.infer


@contextmanager
def leased(peer: DevicePeer, call: int, place: int) -> Iterator[pb.InferResponse]:
    peer.record_in_ready(place)
    yield peer.answer(on_device(call, place, {"x": peer.source}, MODEL, ["y"]))


@pytest.fixture
def ready(peer: DevicePeer) -> DevicePeer:
    """Has X on the device, and has had a result in each place, so that memory is there."""
    peer.source = peer.put(peer.grow_on_device(X.nbytes), X)
    for place in range(1, 5):
        with leased(peer, place, place) as answer:
            (y,) = answer.outputs
            assert peer.out_done(place).wait(20)
            peer.memory[y.ref.epoch, y.ref.chunk].view[:] = 0
            peer.release(y.ref)
    return peer


@pytest.mark.parametrize("model", ["twin_double", "host_double"])
def test_a_run_begins_when_its_inputs_are_written(ready: DevicePeer, model: str) -> None:
    record = ready.record_in_ready(1, is_done=False)
    ready.send(on_device(10, 1, {"x": ready.source}, model, ["y"]))
    assert is_silent(ready)
    ready.memory[ready.source.epoch, 0].view[: X.nbytes] = (X + 1).view(np.uint8)
    record.set()
    (y,) = response(ready).outputs
    assert ready.out_done(1).wait(20)
    assert ready.get(y.ref).tolist() == (2 * (X + 1)).tolist()


def test_inputs_that_are_not_written_in_time(ready: DevicePeer, worker: RunningWorker) -> None:
    before = worker.counters()[MODEL]
    ready.record_in_ready(2, is_done=False)
    request = on_device(10, 2, {"x": ready.source}, MODEL, ["y"], timeout_us=20_000)
    answer = ready.answer(request)
    assert answer.status.reason == pb.REASON_TIMED_OUT
    assert "the event in_ready of place 2 is not done" in answer.status.message
    ready.send(on_device(11, 2, {"x": ready.source}, MODEL, ["y"]))
    assert is_silent(ready)
    ready.send(Request(cancel=pb.Cancel(call=11)))
    assert response(ready).status.reason == pb.REASON_CANCELLED
    after = worker.counters()[MODEL]
    assert after.requests_timed_out == before.requests_timed_out + 1
    assert after.requests_cancelled == before.requests_cancelled + 1
    with leased(ready, 12, 2) as answer:
        assert not answer.HasField("status")


def test_the_answer_comes_before_the_results(ready: DevicePeer, closed: Path) -> None:
    with leased(ready, 10, 3) as answer:
        (y,) = answer.outputs
    done = ready.out_done(3)
    assert not done.wait(0.05)
    assert ready.get(y.ref).tolist() == [0] * 8, "who does not wait reads what was there before"
    closed.unlink()
    assert done.wait(20)
    assert ready.get(y.ref).tolist() == (2 * X).tolist()
    assert answer.timing.copies == 0


def test_memory_is_not_used_again_while_the_device_writes(ready: DevicePeer, closed: Path) -> None:
    with leased(ready, 10, 1) as first:
        ready.release(first.outputs[0].ref)
    ready.record_in_ready(1)
    ready.send(on_device(11, 1, {"x": ready.source}, MODEL, ["y"]))
    assert is_silent(ready)
    closed.unlink()
    assert response(ready).call == 11


def test_memory_is_not_used_again_while_its_client_reads(ready: DevicePeer) -> None:
    with leased(ready, 10, 1) as first:
        (y,) = first.outputs
    assert ready.out_done(1).wait(20)
    reading = ready.record_consumed(1, is_done=False)
    lease = lane_pb2.Lease(epoch=y.ref.epoch, slot=1, generation=y.ref.generation)
    ready.send(Request(releases=[lease]))
    ready.record_in_ready(1)
    ready.send(on_device(11, 1, {"x": ready.source}, MODEL, ["y"]))
    assert is_silent(ready)
    assert ready.get(y.ref).tolist() == (2 * X).tolist()
    reading.set()
    assert response(ready).call == 11


def test_a_result_that_another_run_reads_stays(ready: DevicePeer, gate: Path) -> None:
    with leased(ready, 10, 1) as first:
        (y,) = first.outputs
    assert ready.out_done(1).wait(20)
    gate.touch()
    try:
        ready.record_in_ready(2)
        second = ready.answer(on_device(11, 2, {"x": y.ref}, MODEL, ["y"]))
        ready.release(y.ref)
        ready.record_in_ready(1)
        ready.send(on_device(12, 1, {"x": ready.source}, MODEL, ["y"]))
        assert is_silent(ready)
    finally:
        gate.unlink()
    assert response(ready).call == 12
    assert ready.out_done(2).wait(20)
    assert ready.get(second.outputs[0].ref).tolist() == (4 * X).tolist()


def test_other_calls_go_on_meanwhile(ready: DevicePeer) -> None:
    waits = ready.record_in_ready(1, is_done=False)
    ready.send(on_device(10, 1, {"x": ready.source}, MODEL, ["y"]))
    with leased(ready, 11, 2) as answer:
        assert answer.call == 11
    assert ready.answer(infer(12, "host_double")).call == 12
    waits.set()
    assert response(ready).call == 10
