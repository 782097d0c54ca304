# SPDX-License-Identifier: Apache-2.0
"""Clients whose tensors are on a device share batches, in a real worker: nobody waits for another's
client, and nobody notices another's end.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cuda_lane.conftest import MakePeer
from support.device_peer import DevicePeer, on_device
from support.lane_peer import Request
from support.models import add, write
from support.twin_runs import wait_until
from support.worker import RunningWorker
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import sessions_pb2, tensor_pb2

MODELS = ["twin_four", "host_four", "twin_any"]
# Four rows run together, or none for as long as a test may take.
FOUR = """
max_batch_size: 4
dynamic_batching { preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 60000000 }
"""
ANY = "max_batch_size: 8 dynamic_batching { }"
WAIT_S_MAX = 20


@pytest.fixture(scope="module", autouse=True)
def models(worker: RunningWorker, tmp_path_factory: pytest.TempPathFactory) -> None:
    """c = a + 1, of rows of 4 floats."""
    repository = tmp_path_factory.mktemp("batching")
    for name in MODELS:
        write(repository, name, add(1), ANY if name == "twin_any" else FOUR)
    worker.load(repository)


@pytest.fixture
def closed(gate: Path) -> Iterator[Path]:
    """The device computes nothing until the file is gone."""
    gate.touch()
    yield gate
    gate.unlink(missing_ok=True)


@pytest.fixture
def peers(make_peer: MakePeer) -> list[DevicePeer]:
    """Four sessions, each with rows of its own on the device."""
    made = [make_peer() for _ in range(4)]
    for number, peer in enumerate(made):
        assert not peer.ask_for_device().HasField("status")
        peer.source = peer.put(peer.grow_on_device(16), row(number))
    return made


def row(number: int) -> Array:
    return np.full((1, 4), 10 * number, np.float32)


def ask(peer: DevicePeer, model: str, *, call: int = 1, place: int = 1, stays: bool = True) -> None:
    """Send a request for the row on the device, whose result is to stay there, or not."""
    request = on_device(call, place, {"a": peer.source}, model, ["c"] if stays else [])
    request.infer.inputs[0].shape[:] = [1, 4]
    peer.send(request)


def ask_from_host(peer: DevicePeer, model: str, number: int, *, call: int = 1) -> None:
    request = pb.InferRequest(call=call, model_name=model)
    tensor = request.inputs.add(name="a", data_type=tensor_pb2.DATA_TYPE_FP32, shape=[1, 4])
    tensor.raw = row(number).tobytes()
    peer.send(Request(infer=request))


def response(peer: DevicePeer) -> pb.InferResponse:
    while (message := peer.receive()).WhichOneof("message") == "chunk":
        pass
    return message.infer


def result(peer: DevicePeer, answer: pb.InferResponse) -> Array:
    """What an answer refers to, when the device is done; its memory goes back."""
    assert not answer.HasField("status"), answer.status
    (c,) = answer.outputs
    if not c.HasField("ref"):
        return np.frombuffer(c.raw, np.float32)
    assert peer.out_done(c.ref.slot).wait(WAIT_S_MAX)
    found = peer.get(c.ref)
    peer.release(c.ref)
    return found


def runs(worker: RunningWorker, model: str) -> int:
    return worker.counters()[model].batches


@pytest.mark.parametrize("model", ["twin_four", "host_four"])
def test_tensors_here_and_there_make_one_batch(
    worker: RunningWorker, peers: list[DevicePeer], model: str
) -> None:
    before = runs(worker, model)
    for peer in peers[:3]:
        peer.record_in_ready(1)
    ask(peers[0], model)
    ask(peers[1], model)
    ask(peers[2], model, stays=False)
    ask_from_host(peers[3], model, 3)
    for number, peer in enumerate(peers):
        answer = response(peer)
        assert answer.timing.batch_rows == 4
        assert (result(peer, answer) == row(number) + 1).all()
        assert answer.outputs[0].HasField("ref") == (number < 2)
    assert runs(worker, model) == before + 1


def test_nobody_waits_for_a_client_that_is_late(
    worker: RunningWorker, peers: list[DevicePeer]
) -> None:
    """It joins a batch when its own inputs are there, and not before."""
    late, *others = peers
    record = late.record_in_ready(1, is_done=False)
    ask(late, "twin_four")
    for peer, place in [*((peer, 1) for peer in others), (others[0], 2)]:  # four rows without it
        peer.record_in_ready(place)
        ask(peer, "twin_four", call=place, place=place)
    for peer in (*others, others[0]):
        answer = response(peer)
        assert answer.timing.batch_rows == 4
        assert (result(peer, answer) == row(peers.index(peer)) + 1).all()
    late.memory[late.source.epoch, 0].view[:16] = (row(7)).view(np.uint8).reshape(-1)
    record.set()
    for peer in others:
        ask_from_host(peer, "twin_four", 5, call=3)
    answer = response(late)
    assert answer.timing.batch_rows == 4
    assert (result(late, answer) == row(7) + 1).all()
    assert all((result(peer, response(peer)) == row(5) + 1).all() for peer in others)


def test_an_event_that_never_comes_ends_its_own_request(peers: list[DevicePeer]) -> None:
    late, *others = peers
    late.record_in_ready(1, is_done=False)
    ask(late, "twin_four")
    for peer in others:
        peer.record_in_ready(1)
        ask(peer, "twin_four")
    late.send(Request(cancel=pb.Cancel(call=1)))
    assert response(late).status.reason == pb.REASON_CANCELLED
    ask_from_host(late, "twin_four", 9, call=2)
    for peer in others:
        assert (result(peer, response(peer)) == row(peers.index(peer)) + 1).all()
    assert (result(late, response(late)) == row(9) + 1).all()


def state(worker: RunningWorker, session: int) -> int:
    info = worker.sessions().get(session)
    return sessions_pb2.SESSION_STATE_FREED if info is None else info.state


@pytest.mark.parametrize("model", ["twin_four", "host_four"])
def test_a_client_that_goes_while_it_waits_for_company(
    worker: RunningWorker, peers: list[DevicePeer], make_peer: MakePeer, model: str
) -> None:
    gone, *others = peers
    gone.record_in_ready(1)
    ask(gone, model)
    wait_until(lambda: worker.counters()[model].queued == 1)
    gone.close()
    wait_until(lambda: worker.counters()[model].queued == 0)
    for peer in others:
        peer.record_in_ready(1)
        ask(peer, model)
    ask_from_host(others[0], model, 8, call=2)
    for peer in others:
        assert (result(peer, response(peer)) == row(peers.index(peer)) + 1).all()
    assert (result(others[0], response(others[0])) == row(8) + 1).all()


def test_a_client_that_goes_while_the_device_works(
    worker: RunningWorker, peers: list[DevicePeer], closed: Path
) -> None:
    """Its memory stays until the device is done; the others get their rows."""
    for peer in peers:
        peer.record_in_ready(1)
        ask(peer, "twin_four")
    answers = [response(peer) for peer in peers]  # the device has it, and has not begun
    gone, *others = peers
    session = gone.attachment.session
    gone.close()
    wait_until(lambda: state(worker, session) == sessions_pb2.SESSION_STATE_DRAINING)
    closed.unlink()
    for number, (peer, answer) in enumerate(zip(others, answers[1:], strict=True), 1):
        assert (result(peer, answer) == row(number) + 1).all()
    wait_until(lambda: state(worker, session) != sessions_pb2.SESSION_STATE_DRAINING)


def test_one_is_cancelled_while_the_batch_runs(
    worker: RunningWorker, peers: list[DevicePeer], closed: Path
) -> None:
    """Its place is not used again before the device is done with it."""
    cancelled, on_host, *others = peers
    before = worker.counters()["twin_four"]
    for peer in peers:
        peer.record_in_ready(1)
        ask(peer, "twin_four", stays=peer is not on_host)
    wait_until(lambda: worker.counters()["twin_four"].running == 4)
    cancelled.send(Request(cancel=pb.Cancel(call=1)))
    assert response(cancelled).status.reason == pb.REASON_CANCELLED
    cancelled.record_in_ready(1)
    ask(cancelled, "twin_any", call=2)
    closed.unlink()
    for peer in (on_host, *others):
        assert (result(peer, response(peer)) == row(peers.index(peer)) + 1).all()
    assert (result(cancelled, response(cancelled)) == row(0) + 1).all()
    after = worker.counters()["twin_four"]
    assert after.requests_cancelled == before.requests_cancelled + 1
    assert after.requests_ok == before.requests_ok + 3


def test_requests_that_find_the_device_busy_make_batches(
    worker: RunningWorker, peers: list[DevicePeer], closed: Path
) -> None:
    """Without a delay to wait for company: two runs are given to the device, two more wait for
    their turn, and what comes meanwhile grows to one."""

    before = worker.counters()["twin_any"]

    def read() -> int:
        counters = worker.counters()["twin_any"]
        done = counters.requests_ok - before.requests_ok
        return done + counters.queued + counters.running

    for place in (1, 2, 3):
        for peer in peers:
            peer.record_in_ready(place)
            ask(peer, "twin_any", call=place, place=place)
    wait_until(lambda: read() == 12)
    closed.unlink()
    for number, peer in enumerate(peers):
        for _ in range(3):
            assert (result(peer, response(peer)) == row(number) + 1).all()
    assert runs(worker, "twin_any") - before.batches <= 5
