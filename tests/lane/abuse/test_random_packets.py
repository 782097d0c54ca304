# SPDX-License-Identifier: Apache-2.0
"""Sessions that send packets of any kind."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.lane_peer import LanePeer, Request, X, hello, infer
from support.worker import RunningWorker, running_worker
from thirdrail.lane.aio import AsyncLane
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.config import LaneLimits, WorkerConfig

ANSWER_S_MAX = 20
MIB = 1 << 20


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
    st.builds(Request, grow=st.builds(lane_pb2.GrowRequest, size=uint64s, alone=st.booleans())),
    st.builds(Request, drop=st.builds(lane_pb2.DropRequest, epoch=uint32s, chunk=uint32s)),
    st.builds(Request, ping=st.builds(lane_pb2.Ping, request=uint64s, ref=st.none() | refs)),
    st.builds(
        Request,
        export_tensor=st.builds(
            lane_pb2.ExportRequest,
            request=uint64s,
            ref=refs,
            data_type=st.integers(0, 16),
            shape=st.lists(int64s, max_size=3),
            uid=st.none() | uint32s,
            lifetime_ms=uint32s,
        ),
    ),
    st.builds(
        Request,
        import_tensor=st.builds(
            lane_pb2.ImportRequest, request=uint64s, token=st.binary(max_size=20)
        ),
    ),
    st.builds(Request, revoke=st.builds(lane_pb2.RevokeRequest, request=uint64s)),
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
        peer = LanePeer(worker.sockets.pop())
        peer.attach()
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
def test_many_more_random_packets(
    standard_repository: Path, tmp_path: Path, limits: LaneLimits
) -> None:
    for number in range(5):
        log = tmp_path / f"{number}.txt"
        with running_worker(WorkerConfig(lane=limits), lanes=450, log=log) as worker:
            worker.load(standard_repository, "identity_fp32", "add", "identity_bytes", "gather")
            throw(worker, worker.attach(), 400)
        assert "Traceback" not in log.read_text()
