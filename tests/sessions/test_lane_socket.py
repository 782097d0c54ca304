# SPDX-License-Identifier: Apache-2.0
"""The lane's listening socket: where it is, whom it outlives, and when it is gone."""

import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from conftest import StartServer
from support.lane_peer import LanePeer, X, connect, hello, infer
from support.server import RunningServer
from thirdrail.lane.attach import connect as connect_client
from thirdrail.lane.long_paths import ADDRESS_BYTES_MAX
from thirdrail.v1.sessions_pb2 import (
    OpenSessionRequest,
    OpenSessionResponse,
    ProbeRequest,
)
from thirdrail.v1.sessions_pb2_grpc import SessionsStub
from thirdrail_server.config import ConfigError, ServerConfig
from thirdrail_server.front.sessions.lane_socket import bind_lane, lane_path
from thirdrail_server.front.sessions.service import is_local

UNTIL_S_MAX = 60


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + UNTIL_S_MAX
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def opened(server: RunningServer, *, tcp: bool = False) -> OpenSessionResponse:
    with server.channel(tcp=tcp) as channel:
        return SessionsStub(channel).OpenSession(OpenSessionRequest())


def attach(server: RunningServer, path: Path | None = None) -> LanePeer:
    answer = opened(server)
    peer = LanePeer(connect(path or answer.socket_path))
    peer.attach(token=answer.token)
    return peer


# With a server


def test_it_is_reached_by_another_path(server: RunningServer, tmp_path: Path) -> None:
    """As from another container, which has the folder mounted elsewhere."""
    elsewhere = tmp_path / "mnt"
    elsewhere.symlink_to(server.socket.parent)
    peer = attach(server, elsewhere / opened(server).socket_name)
    assert peer.answer(infer(1)).outputs[0].raw == X.tobytes()
    peer.close()


def test_a_caller_on_the_loopback_address_may_attach_as_well(server: RunningServer) -> None:
    answer = opened(server, tcp=True)
    peer = LanePeer(connect(answer.socket_path))
    peer.attach(token=answer.token)
    peer.close()


@pytest.mark.parametrize(
    ("caller", "local"),
    [
        ("unix:", True),
        ("unix:/run/x.sock", True),
        ("ipv4:127.0.0.1:40000", True),
        ("ipv4:127.8.8.8:1", True),
        ("ipv6:[::1]:40000", True),
        ("ipv6:%5B::1%5D:40000", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:40000", True),
        ("ipv4:192.0.2.7:127", False),
        ("ipv4:12.7.0.0:1", False),
        ("ipv6:[::2]:1", False),
        ("ipv6:%5B2001:db8::1%5D:1", False),
        ("", False),
    ],
)
def test_who_is_on_the_servers_host(caller: str, local: bool) -> None:
    assert is_local(caller) is local


@pytest.mark.slow
def test_it_outlives_a_worker(start_server: StartServer, standard_repository: Path) -> None:
    server = start_server(standard_repository)
    before = opened(server)
    inode = os.stat(before.socket_path).st_ino
    first = attach(server)
    os.kill(server.worker_pid(), signal.SIGKILL)
    with pytest.raises(EOFError):
        first.receive()
    # Whoever connects now waits for the next worker, which has never heard of the token.
    early = LanePeer(connect(before.socket_path))
    early.send(hello(token=before.token))
    assert "is not one of a session that waits for it" in early.goodbye().message
    until(lambda: _answers(server))
    assert os.stat(before.socket_path).st_ino == inode
    for peer in (first, early):
        peer.close()


def _answers(server: RunningServer) -> bool:
    """Whether there is a worker with its models."""
    try:
        peer = attach(server)
    except grpc.RpcError:
        return False
    answer = peer.answer(infer(1))
    peer.close()
    return not answer.status.reason and answer.outputs[0].raw == X.tobytes()


@pytest.mark.slow
def test_it_goes_with_the_server(start_server: StartServer, standard_repository: Path) -> None:
    server = start_server(standard_repository)
    path = Path(opened(server).socket_path)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert server.stop() == 0
    assert not path.exists()


@pytest.mark.slow
def test_it_goes_with_a_front_that_is_killed(
    start_server: StartServer, standard_repository: Path
) -> None:
    server = start_server(standard_repository)
    path = Path(opened(server).socket_path)
    peer = attach(server)
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(EOFError):
        peer.receive()
    until(lambda: not path.exists() and not server.socket.exists())
    peer.close()


def test_whom_the_lane_is_offered_to_and_where_is_probed(server: RunningServer) -> None:
    with server.channel() as channel:
        probe = SessionsStub(channel).Probe(ProbeRequest(payload=b"x"))
    lane = probe.transports[0]
    assert (lane.name, lane.offered, lane.address) == ("lane", True, opened(server).socket_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-lane"], "the server offers no lane (it runs with --no-lane)"),
        (["--no-socket"], "the server offers no lane: it has no Unix socket (--socket PATH)"),
    ],
)
def test_a_server_without_a_lane_says_why(
    start_server: StartServer, standard_repository: Path, arguments: list[str], words: str
) -> None:
    server = start_server(standard_repository, *arguments, wait=False)
    with server.channel(tcp=True) as channel:
        grpc.channel_ready_future(channel).result(UNTIL_S_MAX)
        with pytest.raises(grpc.RpcError) as failure:
            SessionsStub(channel).OpenSession(OpenSessionRequest())
        assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert failure.value.details() == words
        probe = SessionsStub(channel).Probe(ProbeRequest())
        assert (probe.transports[0].offered, probe.transports[0].reason) == (False, words)
    assert not list(server.socket.parent.glob("*.lane"))


@pytest.mark.slow
def test_other_users_reach_it_where_they_may_attach(
    start_server: StartServer, standard_repository: Path
) -> None:
    server = start_server(standard_repository, "--lane-uid=any")
    for path in (opened(server).socket_path, server.socket):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
    # Who is not told apart does not control models: see ControlAccess.


@pytest.mark.slow
def test_a_setting_that_makes_no_sense_is_refused_with_its_flag(
    start_server: StartServer, standard_repository: Path
) -> None:
    for argument, text in (
        ("--lane-uid=me", "--lane-uid takes a user's number, or any, got 'me'"),
        ("--max-sessions=0", "--max-sessions must be 1 or more, got 0"),
        ("--lane-memory-mib=0", "--lane-memory-mib must be 1 or more, got 0"),
    ):
        server = start_server(standard_repository, argument, wait=False)
        assert server.process.wait(UNTIL_S_MAX) == 2
        assert text in " ".join(server.log_text().replace("│", " ").split())


# By itself


def config(folder: Path, name: str = "grpc.sock", *, lane: bool = True) -> ServerConfig:
    return ServerConfig(folder / "models", socket=folder / name, lane=lane)


def test_a_file_that_a_dead_server_left_is_taken_over(tmp_path: Path) -> None:
    path = lane_path(tmp_path / "grpc.sock", "cpu")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    lane = bind_lane(config(tmp_path))
    assert lane is not None
    connect(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lane.close()
    assert not path.exists()


@pytest.mark.slow
def test_another_servers_socket_is_left_alone(tmp_path: Path) -> None:
    first = bind_lane(config(tmp_path, "a.sock"))
    assert first is not None
    with pytest.raises(ConfigError, match=r"another server listens on '.*a.cpu.lane'; choose"):
        bind_lane(config(tmp_path, "a.socket"))
    connect(first.path).close()
    first.close()


@pytest.mark.slow
def test_a_path_longer_than_an_address_is_reached_all_the_same(tmp_path: Path) -> None:
    """The lane's name is longer than the gRPC socket's, which must not decide who can start."""
    name = "x" * (100 - len(str(tmp_path)) - 1)
    for _ in range(2):  # the second time over what the first one would have left
        lane = bind_lane(config(tmp_path, name))
        assert lane is not None
        assert len(str(lane.path)) > ADDRESS_BYTES_MAX
        opened = OpenSessionResponse(socket_path=str(lane.path), socket_name=lane.path.name)
        connect_client(f"unix:{tmp_path / name}", opened).close()
        with pytest.raises(ConfigError, match="another server listens"):
            bind_lane(config(tmp_path, name))
        lane.sock.close()
        assert lane.path.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot listen on the lane's socket '.*': Not a dir"):
        bind_lane(config(tmp_path / "file"))
