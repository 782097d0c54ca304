# SPDX-License-Identifier: Apache-2.0
"""What a client may not do on a lane: it is answered, or ends that session, but no other."""

import array
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.worker import RunningWorker, running_worker
from thirdrail.lane.aio import AsyncLane
from thirdrail.tensors import tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.config import LaneLimits, WorkerConfig

LANES = 300
LIMITS = LaneLimits(
    calls_in_flight_max=32, input_arena_bytes_max=8 << 20, output_arena_bytes_max=8 << 20
)
PACKET_BYTES_MAX = LIMITS.packet_bytes_max
ANSWER_S_MAX = 20
MIB = 1 << 20
X = np.array([1, 2, 3], np.float32)

Request = lane_pb2.LaneRequest
Response = lane_pb2.LaneResponse


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worker") / "log.txt"


@pytest.fixture(scope="module")
def worker(standard_repository: Path, log: Path) -> Iterator[RunningWorker]:
    with running_worker(WorkerConfig(lane=LIMITS), lanes=LANES, log=log) as running:
        running.load(standard_repository, "identity_fp32", "add", "identity_bytes", "gather")
        yield running


@pytest.fixture(scope="module")
def neighbour(worker: RunningWorker) -> AsyncLane:
    """A well-behaved session that must not notice anything."""
    return worker.attach()


@pytest.fixture(autouse=True)
def nobody_else_notices(worker: RunningWorker, neighbour: AsyncLane, log: Path) -> Iterator[None]:
    yield
    reply = worker.infer(neighbour, infer(1).infer)
    assert reply.data[0] == X.tobytes()
    assert "Traceback" not in log.read_text()
    assert "Exception" not in log.read_text()


def infer(call: int, model: str = "identity_fp32", **fields: object) -> Request:
    request = pb.InferRequest(call=call, model_name=model, **fields)  # type: ignore[arg-type]
    if "inputs" not in fields:
        request.inputs.append(tensor_of_array("x", X))
    return Request(infer=request)


def hello(version_min: int = 1, version_max: int = 1, features: Sequence[str] = ()) -> Request:
    return Request(
        hello=lane_pb2.Hello(version_min=version_min, version_max=version_max, features=features)
    )


class Peer:
    """A lane's client that sends what it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(ANSWER_S_MAX)

    @classmethod
    def attached(cls, worker: RunningWorker) -> "Peer":
        peer = cls(worker.sockets.pop())
        peer.send(hello())
        peer.attachment = peer.receive().attached
        return peer

    attachment: lane_pb2.Attached

    def send(self, *messages: Request) -> None:
        for message in messages:
            self.sock.send(message.SerializeToString())

    def receive(self) -> Response:
        """EOFError at the session's end; ConnectionResetError counts as that."""
        try:
            packet, fds, _, _ = socket.recv_fds(self.sock, PACKET_BYTES_MAX, 4)
        except ConnectionResetError:
            raise EOFError from None
        for fd in fds:
            os.close(fd)
        if not packet:
            raise EOFError
        return Response.FromString(packet)

    def answer(self, message: Request) -> pb.InferResponse:
        self.send(message)
        return self.receive().infer

    def is_cut_off(self) -> bool:
        try:
            self.sock.send(infer(1).SerializeToString())
        except ConnectionError:
            return True
        return False

    def goodbye(self) -> pb.Status:
        """The last packet, whatever comes before it."""
        response = Response()
        with contextlib.suppress(EOFError):
            while True:
                response = self.receive()
        assert response.WhichOneof("message") == "goodbye"
        return response.goodbye.status


@pytest.fixture
def peer(worker: RunningWorker) -> Iterator[Peer]:
    attached = Peer.attached(worker)
    yield attached
    attached.sock.close()


# What ends a session


@pytest.mark.parametrize(
    ("packet", "reason", "text"),
    [
        (b"\xff" * 10, "INVALID_ARGUMENT", "a packet of 10 bytes is not a LaneRequest"),
        (
            b"\0" * (PACKET_BYTES_MAX + 1),
            "INVALID_ARGUMENT",
            f"a packet of more than {PACKET_BYTES_MAX} bytes, or with file descriptors",
        ),
        (hello().SerializeToString(), "INVALID_ARGUMENT", "the lane is attached already"),
        (b"\xa2\x06\x00", "UNIMPLEMENTED", "a packet holds no message that this worker knows"),
        (b"\x30\x05", "UNIMPLEMENTED", "a packet holds no message that this worker knows"),
    ],
)
def test_a_broken_rule_ends_the_session_with_its_name(
    peer: Peer, packet: bytes, reason: str, text: str
) -> None:
    peer.sock.send(packet)
    status = peer.goodbye()
    assert pb.Reason.Name(status.reason) == f"REASON_{reason}"
    assert status.message == text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (infer(1), "the first message must be a hello, got infer"),
        (Request(grow=lane_pb2.GrowRequest(size=1)), "the first message must be a hello, got grow"),
        (Request(flow=1), "the first message must be a hello, got None"),
        (hello(2, 9), "this worker speaks lane versions 1 to 1, the client 2 to 9"),
        (hello(0, 0), "this worker speaks lane versions 1 to 1, the client 0 to 0"),
        (hello(5, 1), "this worker speaks lane versions 1 to 1, the client 5 to 1"),
    ],
)
def test_a_session_begins_with_a_hello_that_fits(
    worker: RunningWorker, message: Request, text: str
) -> None:
    stranger = Peer(worker.sockets.pop())
    stranger.send(message)
    assert stranger.goodbye().message == text
    stranger.sock.close()


def test_an_empty_packet_reads_as_the_end(peer: Peer) -> None:
    peer.sock.send(b"")
    with pytest.raises(EOFError):
        peer.receive()


def test_unknown_features_are_not_used(worker: RunningWorker) -> None:
    stranger = Peer(worker.sockets.pop())
    stranger.send(hello(0, 7, ["teleport", "", "x" * 1000]))
    attached = stranger.receive().attached
    assert (attached.version, list(attached.features)) == (1, [])
    stranger.sock.close()


def test_file_descriptors_are_not_taken(worker: RunningWorker, peer: Peer) -> None:
    before = worker.fd_count()
    read, write = os.pipe()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [read] * 5))
    peer.sock.sendmsg([infer(1).SerializeToString()], [rights])
    assert "with file descriptors" in peer.goodbye().message
    os.close(read)
    os.close(write)
    assert worker.fd_count() <= before


def test_memory_asked_for_twice_at_a_time_ends_the_session(peer: Peer) -> None:
    peer.send(*[Request(grow=lane_pb2.GrowRequest(size=MIB))] * 2)
    assert peer.goodbye().message == "input memory is asked for twice at a time"


def test_a_peer_that_never_reads_is_cut_off(worker: RunningWorker, peer: Peer) -> None:
    """Its answers wait for it up to a bound."""
    before = psutil.Process(worker.process.pid).memory_info().rss
    packet = infer(1, "none").SerializeToString()
    with contextlib.suppress(ConnectionError):
        for _ in range(1_000_000):
            peer.sock.send(packet)
    assert peer.is_cut_off()
    assert psutil.Process(worker.process.pid).memory_info().rss - before < 20 * MIB


# What is answered


def by_ref(**fields: int) -> Request:
    tensor = tensor_pb2.Tensor(name="x", data_type=tensor_pb2.DATA_TYPE_FP32, shape=[4])
    tensor.ref.CopyFrom(tensor_pb2.ArenaRef(**fields))
    return infer(1, inputs=[tensor])


LAST = (1 << 64) - 64


@pytest.mark.parametrize(
    ("ref", "reason", "text"),
    [
        ({"epoch": 1, "size": 16}, "FAILED_PRECONDITION", "tensor 'x' refers to epoch 1, this"),
        ({"size": 16, "chunk": 1}, "INVALID_ARGUMENT", "tensor 'x' refers to chunk 1 of 1"),
        ({"size": 16, "chunk": (1 << 32) - 1}, "INVALID_ARGUMENT", "refers to chunk 4294967295"),
        ({"size": 16, "offset": MIB}, "INVALID_ARGUMENT", "to 1048592 of a chunk of 1048576"),
        ({"size": 16, "offset": 8}, "INVALID_ARGUMENT", "offsets are multiples of 64"),
        ({"size": 128, "offset": LAST}, "INVALID_ARGUMENT", "refers to bytes 18446744073709551552"),
        ({"size": (1 << 64) - 1}, "INVALID_ARGUMENT", "of a chunk of 1048576"),
        ({"size": 12}, "INVALID_ARGUMENT", "Expected 16, got 12"),
        ({"size": 0}, "INVALID_ARGUMENT", "Expected 16, got 0"),
        ({"size": 0, "offset": MIB}, "INVALID_ARGUMENT", "Expected 16, got 0"),
    ],
)
def test_references_to_other_memory_are_refused(
    peer: Peer, ref: dict[str, int], reason: str, text: str
) -> None:
    peer.send(Request(grow=lane_pb2.GrowRequest(size=1)))
    assert peer.receive().chunk.size == MIB
    status = peer.answer(by_ref(**{"epoch": peer.attachment.input_epoch, **ref})).status
    assert pb.Reason.Name(status.reason) == f"REASON_{reason}"
    assert text in status.message
    assert not peer.answer(infer(2)).status.reason, "the session goes on"


def test_the_output_memory_cannot_be_referred_to(peer: Peer) -> None:
    status = peer.answer(by_ref(epoch=peer.attachment.output_epoch, size=16)).status
    assert status.reason == pb.REASON_FAILED_PRECONDITION


def test_stale_releases_free_nothing(worker: RunningWorker, peer: Peer) -> None:
    large = np.arange(MIB // 4, dtype=np.float32)
    two = np.stack([large, large])  # 2 MiB each; 8 MiB fit
    request = infer(1, inputs=[])
    peer.send(Request(grow=lane_pb2.GrowRequest(size=two.nbytes)))
    peer.receive()
    tensor = request.infer.inputs.add(
        name="x", data_type=tensor_pb2.DATA_TYPE_FP32, shape=[two.size]
    )
    tensor.ref.CopyFrom(tensor_pb2.ArenaRef(epoch=peer.attachment.input_epoch, size=two.nbytes))
    answered = []
    for call in range(20):
        request.infer.call = call
        peer.send(request)
        while (response := peer.receive()).WhichOneof("message") == "chunk":
            pass
        if response.infer.status.reason:
            break
        ref = response.infer.outputs[0].ref
        answered.append(ref)
        stale = [(ref.epoch, ref.slot, ref.generation + 1), (ref.epoch + 1, ref.slot, 1)]
        stale += [(ref.epoch, 0, 0), (ref.epoch, ref.slot + 999, 1), (0, 0, 0)]
        leases = [lane_pb2.Lease(epoch=e, slot=s, generation=g) for e, s, g in stale]
        peer.send(Request(releases=leases))
    assert response.infer.status.reason == pb.REASON_RESOURCE_EXHAUSTED
    assert 2 <= len(answered) <= 4
    assert len({(ref.chunk, ref.offset) for ref in answered}) == len(answered)
    last = answered[-1]
    lease = lane_pb2.Lease(epoch=last.epoch, slot=last.slot, generation=last.generation)
    peer.send(Request(releases=[lease] * 3))  # the first counts, the others are late
    request.infer.call = 98
    assert not peer.answer(request).status.reason
    request.infer.call = 99
    assert peer.answer(request).status.reason == pb.REASON_RESOURCE_EXHAUSTED


def test_more_memory_than_there_may_be_is_refused(peer: Peer) -> None:
    for size in (1 << 63, (8 << 20) + 1):
        peer.send(Request(grow=lane_pb2.GrowRequest(size=size)))
        assert "of 8388608 are in use" in peer.receive().grow_refused.message
    assert not peer.answer(infer(2)).status.reason


def test_more_calls_than_agreed_are_refused(worker: RunningWorker, peer: Peer) -> None:
    """The calls wait for company that never comes, so none of them ends meanwhile."""
    calls = LIMITS.calls_in_flight_max + 5
    a = tensor_of_array("a", np.zeros((1, 4), np.float32))
    b = tensor_of_array("b", np.zeros((1, 4), np.float32))
    peer.send(*(infer(call, "add", inputs=[a, b]) for call in range(calls)))
    answers = [peer.receive().infer for _ in range(calls)]
    assert sorted(each.call for each in answers) == list(range(calls))
    reasons = {each.status.reason for each in answers}
    assert reasons <= {0, pb.REASON_RESOURCE_EXHAUSTED}


# At random

names = st.sampled_from(["x", "a", "y", "", "ü", "x" * 3000])
int64s = st.one_of(st.integers(-2, 5), st.integers(-(1 << 63), (1 << 63) - 1))
uint32s = st.one_of(st.integers(0, 3), st.integers(0, (1 << 32) - 1))
uint64s = st.one_of(st.integers(0, 3).map(lambda n: n * 64), st.integers(0, (1 << 64) - 1))

refs = st.builds(
    tensor_pb2.ArenaRef,
    epoch=uint32s | st.integers(1, 700),
    chunk=uint32s,
    offset=uint64s,
    size=uint64s,
    slot=uint32s,
    generation=uint32s,
)
values = st.builds(
    tensor_pb2.Tensor().values.__class__,
    bools=st.lists(st.booleans(), max_size=2),
    ints=st.lists(int64s, max_size=2),
    floats=st.lists(st.floats(), max_size=2),
    strings=st.lists(st.text(max_size=3), max_size=2),
    byte_strings=st.lists(st.binary(max_size=3), max_size=2),
)
tensors_ = st.builds(
    lambda fields, data: tensor_pb2.Tensor(**fields, **data),
    st.fixed_dictionaries(
        {
            "name": names,
            "data_type": st.integers(0, 16),
            "shape": st.lists(int64s, max_size=3),
        }
    ),
    st.one_of(
        st.just({}),
        st.fixed_dictionaries({"raw": st.binary(max_size=64)}),
        st.fixed_dictionaries({"ref": refs}),
        st.fixed_dictionaries({"values": values}),
    ),
)
infers = st.builds(
    pb.InferRequest,
    call=st.integers(0, 3),
    model_name=st.sampled_from(["identity_fp32", "add", "identity_bytes", "gather", "none", ""]),
    model_id=uint32s,
    model_version=int64s,
    request_id=st.sampled_from(["", "r", "x" * 2000]),
    inputs=st.lists(tensors_, max_size=3),
    outputs=st.lists(
        st.builds(pb.RequestedOutput, name=names, form=st.integers(0, 3), class_count=uint32s),
        max_size=2,
    ),
    priority=uint32s,
    timeout_us=uint64s,
)
leases = st.builds(lane_pb2.Lease, epoch=uint32s, slot=uint32s, generation=uint32s)
messages = st.one_of(
    st.builds(Request, infer=infers, releases=st.lists(leases, max_size=3), flow=uint64s),
    st.builds(Request, cancel=st.builds(pb.Cancel, call=st.integers(0, 3))),
    st.builds(Request, grow=st.builds(lane_pb2.GrowRequest, size=uint64s)),
    st.builds(Request, releases=st.lists(leases, min_size=1, max_size=3)),
    st.just(hello()),
)
VALID = infer(9).SerializeToString()
packets = st.one_of(
    messages.map(lambda message: message.SerializeToString() or b"\x32\x00"),
    st.binary(min_size=1, max_size=64),
    st.builds(
        lambda at, byte: VALID[:at] + bytes([byte]) + VALID[at + 1 :],
        st.integers(0, len(VALID)),
        st.integers(0, 255),
    ),
    st.integers(1, len(VALID) - 1).map(lambda length: VALID[:length]),
)


def throw(worker: RunningWorker, neighbour: AsyncLane, count: int) -> None:
    """So many sessions, each with a few packets of any kind."""

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(packets, min_size=1, max_size=6))
    def one_session(sent: list[bytes]) -> None:
        peer = Peer.attached(worker)
        try:
            for packet in sent:
                peer.sock.send(packet)
            peer.send(infer(777))
            while peer.receive().infer.call != 777:
                pass
        except (EOFError, ConnectionError):
            pass  # one of the packets ended the session
        finally:
            peer.sock.close()
        assert worker.infer(neighbour, infer(1).infer).data[0] == X.tobytes()

    one_session()


def footprint(worker: RunningWorker) -> tuple[int, int]:
    """Resident bytes and descriptors."""
    return psutil.Process(worker.process.pid).memory_info().rss, worker.fd_count()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ANSWER_S_MAX
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_random_packets(worker: RunningWorker, neighbour: AsyncLane) -> None:
    throw(worker, neighbour, 40)  # what grows only once has grown
    rss, fds = footprint(worker)
    sockets = len(worker.sockets)
    throw(worker, neighbour, 150)
    ended = sockets - len(worker.sockets)
    until(lambda: worker.status().sessions == len(worker.sockets) + 1)
    after_rss, after_fds = footprint(worker)
    assert after_rss - rss < 20 * MIB
    assert after_fds <= fds - ended


@pytest.mark.slow
def test_many_more_random_packets(standard_repository: Path, tmp_path: Path) -> None:
    for number in range(5):
        log = tmp_path / f"{number}.txt"
        with running_worker(WorkerConfig(lane=LIMITS), lanes=450, log=log) as worker:
            worker.load(standard_repository, "identity_fp32", "add", "identity_bytes", "gather")
            throw(worker, worker.attach(), 400)
        assert "Traceback" not in log.read_text()
