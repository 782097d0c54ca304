# SPDX-License-Identifier: Apache-2.0
"""A lane's listening socket: bound by the front, in the folder of its gRPC socket.

Each worker has one, which the front keeps and every successor of the worker inherits, so clients
that connect while a worker is replaced wait for the next one. Who may use it is decided by the
worker, by uid; the file's mode only spares it those whom it would refuse.
"""

import socket
import time
from pathlib import Path

from thirdrail.lane.long_paths import socket_address
from thirdrail_server.config import ConfigError, ServerConfig
from thirdrail_server.front.listeners import socket_mode
from thirdrail_server.front.unix_sockets import bound_with, is_answered, locked, remove_left
from thirdrail_server.repository.device_choice import CPU

BACKLOG = 128
# The worker of a front that was killed holds its socket a moment longer.
TAKEOVER_S_MAX = 2.0
_RETRY_S = 0.02


class LaneSocket:
    """From `bind` to `close`."""

    def __init__(self, path: Path, sock: socket.socket) -> None:
        self.path = path
        self.sock = sock

    def close(self) -> None:
        """Remove the file and hang up."""
        self.path.unlink(missing_ok=True)
        self.sock.close()


def lane_path(grpc_socket: Path, worker: str) -> Path:
    """worker: "cuda:GPU-..." becomes a part of a name that needs no quotes."""
    return grpc_socket.with_name(f"{grpc_socket.stem}.{worker.replace(':', '-')}.lane")


def bind_lane(config: ServerConfig, worker: str = CPU.worker) -> LaneSocket | None:
    """None where the configuration wants none. Raises ConfigError where it cannot be bound."""
    if config.socket is None or not config.lane:
        return None
    path = lane_path(config.socket, worker)
    try:
        with locked(path.parent):
            if _is_answered_for_long(path):
                raise ConfigError(
                    f"another server listens on '{path}'; choose another --socket, or --no-lane"
                )
            return LaneSocket(path, _bind(path, socket_mode(config)))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on the lane's socket '{path}': {error.strerror}; choose another "
            "--socket, or --no-lane"
        ) from None


def _bind(path: Path, mode: int) -> socket.socket:
    remove_left(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        with bound_with(mode), socket_address(path) as address:
            sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_answered_for_long(path: Path) -> bool:
    deadline_s = time.monotonic() + TAKEOVER_S_MAX
    while is_answered(path, socket.SOCK_SEQPACKET):
        if time.monotonic() >= deadline_s:
            return True
        time.sleep(_RETRY_S)
    return False
