# SPDX-License-Identifier: Apache-2.0
"""From OpenSession's answer to a connected socket, on real sockets; and when it is tried again."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from thirdrail import errors, transport
from thirdrail.lane import attach
from thirdrail.transport import CannotAttach, LaneRule, Transport
from thirdrail.v1 import inference_pb2, sessions_pb2

NAME = "grpc.cpu.lane"
OTHER_UID = 12345

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its uid, which root may")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "grpc.sock").touch()
    return tmp_path / "s"


@pytest.fixture
def listener(folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(folder / NAME))
        listening.listen(1)
        yield listening


def opened(path: Path | str = "", name: str = NAME) -> sessions_pb2.OpenSessionResponse:
    return sessions_pb2.OpenSessionResponse(socket_name=name, socket_path=str(path))


# -- where the socket is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("unix:/run/s/grpc.sock", "/run/s/grpc.sock"),
        ("unix:///run/s/grpc.sock", "/run/s/grpc.sock"),
        ("unix:s/grpc.sock", "s/grpc.sock"),
        ("unix-abstract:name", None),
        ("127.0.0.1:8001", None),
        ("dns:unix:1", None),
    ],
)
def test_the_path_of_a_target(address: str, path: str | None) -> None:
    assert attach.unix_path(address) == path


def test_the_folder_of_the_grpc_socket_comes_first() -> None:
    answer = opened("/srv/grpc.cpu.lane")
    assert attach.socket_candidates("unix:/mnt/grpc.sock", answer) == [
        "/mnt/grpc.cpu.lane",
        "/srv/grpc.cpu.lane",
    ]
    assert attach.socket_candidates("unix:/srv/grpc.sock", answer) == ["/srv/grpc.cpu.lane"]
    assert attach.socket_candidates("127.0.0.1:8001", answer) == ["/srv/grpc.cpu.lane"]
    assert attach.socket_candidates("unix:grpc.sock", opened()) == [NAME]


def test_a_name_that_leads_elsewhere() -> None:
    for name in ("../root.sock", "/root.sock", "a\0b"):
        with pytest.raises(CannotAttach, match="expected a file name"):
            attach.socket_candidates("unix:/mnt/grpc.sock", opened(name=name))
    assert attach.socket_candidates("127.0.0.1:1", opened("relative/path")) == []


def test_connecting_by_folder_and_by_path(folder: Path, listener: socket.socket) -> None:
    for address, answer in (
        (f"unix:{folder}/grpc.sock", opened("/elsewhere/grpc.cpu.lane")),
        ("127.0.0.1:8001", opened(folder / NAME)),
    ):
        with attach.connect(address, answer) as ours, listener.accept()[0] as theirs:
            assert ours.getblocking()
            theirs.send(b"packet")
            assert ours.recv(100) == b"packet"


def test_the_servers_folder_under_another_path(
    folder: Path, listener: socket.socket, tmp_path: Path
) -> None:
    """As in another container: the path that the server knows is not there."""
    mounted = tmp_path / "mounted"
    mounted.symlink_to(folder)
    with attach.connect(f"unix:{mounted}/grpc.sock", opened("/gone/grpc.cpu.lane")):
        listener.accept()[0].close()


# -- why not -----------------------------------------------------------------------------------


def test_the_socket_is_not_there(folder: Path) -> None:
    with pytest.raises(CannotAttach, match="another host") as raised:
        attach.connect("10.0.0.1:8001", opened(folder / NAME))
    assert str(folder / NAME) in raised.value.reason
    assert not raised.value.is_passing
    with pytest.raises(CannotAttach, match="not at any path"):
        attach.connect("10.0.0.1:8001", opened())


def test_nobody_listens(folder: Path, listener: socket.socket) -> None:
    listener.close()
    with pytest.raises(CannotAttach, match="nobody listens") as raised:
        attach.connect(f"unix:{folder}/grpc.sock", opened())
    assert raised.value.is_passing


def test_something_else_lies_there(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.bind(str(folder / NAME))
        stream.listen()
        with pytest.raises(CannotAttach, match=r"cannot connect .* wrong type"):
            attach.connect(f"unix:{folder}/grpc.sock", opened())
    with pytest.raises(CannotAttach, match="its socket's folder is not mounted"):
        attach.connect(f"unix:/{'x' * 200}/grpc.sock", opened())


def test_the_second_place_is_tried_when_the_first_fails(
    folder: Path, listener: socket.socket, tmp_path: Path
) -> None:
    (tmp_path / NAME).touch()
    with attach.connect(f"unix:{tmp_path}/grpc.sock", opened(folder / NAME)):
        listener.accept()[0].close()


def test_a_queue_that_stays_full(
    folder: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "CONNECT_TIMEOUT_S", 0.05)
    address, waiting = f"unix:{folder}/grpc.sock", []
    while (sock := attach.connect_at_once(address, opened())) is not None:
        assert not sock.getblocking()
        waiting.append(sock)
    with pytest.raises(CannotAttach, match="does not accept") as raised:
        attach.connect(address, opened())
    assert raised.value.is_passing
    listener.accept()[0].close()
    attach.connect(address, opened()).close()
    for sock in waiting:
        sock.close()


def attached_as_other_uid(address: str) -> str:
    """Why a program that runs as OTHER_UID cannot connect; empty where it can."""
    code = f"""
import os, sys
from thirdrail.lane import attach
from thirdrail.transport import CannotAttach
from thirdrail.v1 import sessions_pb2

os.setgroups([])
os.setgid({OTHER_UID})
os.setuid({OTHER_UID})
try:
    attach.connect(sys.argv[1], sessions_pb2.OpenSessionResponse(socket_name="{NAME}"))
except CannotAttach as why:
    print(why.reason)
"""
    command = [sys.executable, "-c", code, address]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def let_others_pass(folder: Path) -> None:
    """pytest's folders are for one user."""
    for part in (folder, *folder.parents):
        if "pytest" in part.parts[-1] or "pytest" in str(part.parent):
            part.chmod(0o755)


@needs_root
def test_a_uid_that_may_not_connect(folder: Path, listener: socket.socket) -> None:
    let_others_pass(folder)
    (folder / NAME).chmod(0o600)
    said = attached_as_other_uid(f"unix:{folder}/grpc.sock")
    assert f"permission denied: uid {OTHER_UID} may not connect to '{folder}/{NAME}'" in said
    assert "--lane-uid" in said
    (folder / NAME).chmod(0o666)
    assert attached_as_other_uid(f"unix:{folder}/grpc.sock") == ""


@needs_root
def test_a_stranger_who_listens(folder: Path) -> None:
    """Whoever may write to the folder could wait there for tokens."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(str(folder / NAME))
    os.seteuid(OTHER_UID)  # SO_PEERCRED tells who listens, not who bound
    try:
        listening.listen(4)
    finally:
        os.seteuid(0)
    with pytest.raises(CannotAttach, match=rf"uid {OTHER_UID} listens .* expected 0$"):
        attach.connect(f"unix:{folder}/grpc.sock", opened())
    os.chown(folder / "grpc.sock", OTHER_UID, -1)  # the server that we were told to call is theirs
    attach.connect(f"unix:{folder}/grpc.sock", opened()).close()
    listening.close()


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CannotAttach, match="needs Linux, this is darwin"):
        attach.connect("unix:/s/grpc.sock", opened())


def test_refusals_keep_the_servers_words() -> None:
    def said(reason: inference_pb2.Reason.ValueType) -> CannotAttach:
        return attach.refused(inference_pb2.Status(reason=reason, message="its words"))

    assert said(inference_pb2.REASON_PERMISSION_DENIED).reason == "its words"
    assert not said(inference_pb2.REASON_PERMISSION_DENIED).is_passing
    assert said(inference_pb2.REASON_RESOURCE_EXHAUSTED).is_passing
    assert said(inference_pb2.REASON_UNAVAILABLE).is_passing


# -- the rule ----------------------------------------------------------------------------------


def test_auto_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "thirdrail")
    rule = LaneRule("auto")
    assert rule.is_due(100.0)
    rule.failed(CannotAttach("the server is older"), 100.0)
    assert not rule.is_due(100.0 + transport.ATTACH_AGAIN_LATER_S - 0.1)
    assert rule.is_due(100.0 + transport.ATTACH_AGAIN_LATER_S)
    rule.failed(CannotAttach("the server is older"), 200.0)
    assert rule.over_grpc("unix:/s") == Transport("grpc-unix", "unix:/s", "the server is older")
    assert rule.over_grpc("h:1") == Transport("grpc-tcp", "h:1", "the server is older")
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert "the server is older" in caplog.text

    rule.attached()
    assert rule.is_due(200.0)
    rule.failed(CannotAttach("the server is older"), 200.0)
    assert len(caplog.records) == 2  # news again: it had worked in between


def test_what_passes_is_tried_again_soon() -> None:
    rule = LaneRule()
    rule.failed(CannotAttach("the worker starts", is_passing=True), 100.0)
    assert not rule.is_due(100.0 + transport.ATTACH_AGAIN_SOON_S / 2)
    assert rule.is_due(100.0 + transport.ATTACH_AGAIN_SOON_S)


def test_nothing_but_the_lane() -> None:
    rule = LaneRule("lane")
    with pytest.raises(errors.FailedPrecondition, match="cannot use the lane: it is far"):
        rule.failed(CannotAttach("it is far"), 100.0)
    with pytest.raises(errors.Unavailable, match="cannot use the lane: it starts"):
        rule.failed(CannotAttach("it starts", is_passing=True), 100.0)
    assert rule.is_due(100.0)


def test_nothing_but_grpc() -> None:
    rule = LaneRule("grpc")
    assert not rule.is_due(1e9)
    assert rule.over_grpc("h:1").reason == transport.ASKED_FOR_GRPC
    with pytest.raises(errors.InvalidArgument, match="unknown transport 'smoke'"):
        LaneRule("smoke")  # type: ignore[arg-type]
