# SPDX-License-Identifier: Apache-2.0
"""Taking over the place of a socket: from a server that is gone, from nobody and nothing else."""

import contextlib
import socket
from pathlib import Path

import grpc
import pytest

from thirdrail_server.config import ConfigError, ServerConfig
from thirdrail_server.front.listeners import listen
from thirdrail_server.front.sessions.lane_socket import bind_lane, lane_path
from thirdrail_server.front.unix_sockets import is_answered, remove_left

KINDS = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)


async def listen_at(path: Path) -> None:
    server = grpc.aio.server()
    try:
        listen(server, ServerConfig(path.parent, address=None, socket=path))
    finally:
        await server.stop(None)


async def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("weights")
    with pytest.raises(ConfigError, match=r"model\.onnx' is no socket, and stays: choose another"):
        await listen_at(path)
    assert path.read_text() == "weights"


def test_nor_does_a_lane_take_the_place_of_a_file(tmp_path: Path) -> None:
    config = ServerConfig(tmp_path, socket=tmp_path / "s.sock")
    path = lane_path(tmp_path / "s.sock", "cpu")
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is no socket"):
        bind_lane(config)
    assert path.read_text() == "mine"


def test_what_a_server_has_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    remove_left(path)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    remove_left(path)
    assert not path.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_answers_nobody_is_there_all_the_same(
    tmp_path: Path, kind: socket.SocketKind
) -> None:
    path = tmp_path / "s.sock"
    with contextlib.ExitStack() as callers, socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(str(path))
        assert not is_answered(path, kind)
        listener.listen(0)
        assert is_answered(path, kind)
        while _is_let_in(callers.enter_context(socket.socket(socket.AF_UNIX, kind)), path):
            pass
        assert is_answered(path, kind)


def _is_let_in(caller: socket.socket, path: Path) -> bool:
    """Whether there is room for one more in the listener's queue."""
    caller.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        caller.connect(str(path))
        return True
    return False
