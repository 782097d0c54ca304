# SPDX-License-Identifier: Apache-2.0
"""From the answer to OpenSession to a connected socket: the steps that both clients share.

The server names its socket by the name in the folder of its gRPC socket, which may be mounted
elsewhere here, and by its own path. Who listens there is checked before a token is sent: anybody
may bind a path in a shared folder. A failure is a `CannotAttach` that says what to change.
"""

import contextlib
import errno
import os
import socket
import struct
import sys
import time

import grpc

from thirdrail import errors
from thirdrail.failures import Unreachable, error_of_ended_call
from thirdrail.lane.long_paths import socket_address
from thirdrail.transport import CannotAttach
from thirdrail.v1 import inference_pb2, sessions_pb2

OPEN_TIMEOUT_S = 2.0  # of the call OpenSession
ASK_TIMEOUT_S = 2.0  # where a model is, or why it is not
CONNECT_TIMEOUT_S = 1.0  # while the server's queue of connections is full
CONNECT_RETRY_S = 0.005
HELLO_TIMEOUT_S = 10.0

_PEER_CREDENTIALS = struct.Struct("iII")  # struct ucred of unix(7): pid, uid, gid
_PASSING = (errors.Unavailable, errors.ResourceExhausted, errors.TimedOut, errors.Internal)


def check_platform() -> None:
    """Raises CannotAttach where sealed memfds do not exist. To be asked before all else."""
    if sys.platform != "linux":
        raise CannotAttach(f"the lane needs Linux, this is {sys.platform}")


def client_name() -> str:
    """What we call ourselves, for people who look at the sessions: the program's name."""
    return os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "python"


def connect(address: str, opened: sessions_pb2.OpenSessionResponse) -> socket.socket:
    """The connected SOCK_SEQPACKET socket of a session, blocking; waits at most CONNECT_TIMEOUT_S.

    address: the gRPC target that answered. Raises CannotAttach.
    """
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    while (sock := connect_at_once(address, opened)) is None:
        if time.monotonic() >= deadline_s:
            raise queue_is_full(opened)
        time.sleep(CONNECT_RETRY_S)
    sock.setblocking(True)
    return sock


def connect_at_once(address: str, opened: sessions_pb2.OpenSessionResponse) -> socket.socket | None:
    """The same without waiting, and non-blocking. None: the server's queue is full at the moment.

    Raises CannotAttach.
    """
    check_platform()
    faults: list[CannotAttach] = []
    trusted = _trusted_uids(address)
    for path in socket_candidates(address, opened):
        try:
            return _connect(path, trusted)
        except BlockingIOError:
            return None
        except FileNotFoundError:
            continue
        except OSError as error:
            faults.append(_fault_of(path, error))
        except CannotAttach as fault:
            faults.append(fault)
    raise faults[0] if faults else _not_there(address, opened)


def socket_candidates(address: str, opened: sessions_pb2.OpenSessionResponse) -> list[str]:
    """Where the lane's socket may be, best first. Raises CannotAttach for a name with a folder."""
    name, paths = opened.socket_name, []
    grpc_socket = unix_path(address)
    if name and grpc_socket is not None:
        if "/" in name or "\0" in name:
            raise CannotAttach(f"the server calls its lane's socket {name!r}, expected a file name")
        paths.append(os.path.join(os.path.dirname(grpc_socket), name))
    if opened.socket_path.startswith("/") and "\0" not in opened.socket_path:
        paths.append(opened.socket_path)
    return list(dict.fromkeys(paths))


def unix_path(address: str) -> str | None:
    """The path of a gRPC target that is a Unix socket: `unix:path` or `unix:///path`."""
    if not address.startswith("unix:"):
        return None
    path = address.removeprefix("unix:")
    return path.removeprefix("//") if path.startswith("///") else path


def cannot_open(error: grpc.RpcError, address: str) -> CannotAttach:
    """Why OpenSession failed. Raises Unreachable instead where no server answers at all."""
    failure = error_of_ended_call(error, address=address, timeout=OPEN_TIMEOUT_S)
    if isinstance(failure, Unreachable):
        raise failure from None
    if isinstance(failure, errors.Unimplemented):
        return CannotAttach(
            f"the server at {address} is older than the lane: it does not know OpenSession"
        )
    return CannotAttach(failure.message, is_passing=isinstance(failure, _PASSING))


def refused(status: inference_pb2.Status) -> CannotAttach:
    """Why the worker answered our hello with a goodbye."""
    failure = errors.error_of_reason(status.reason, status.message)
    return CannotAttach(failure.message, is_passing=isinstance(failure, _PASSING))


def not_answered(reason: str) -> CannotAttach:
    """The worker was silent, or hung up, after our hello."""
    return CannotAttach(reason, is_passing=True)


def queue_is_full(opened: sessions_pb2.OpenSessionResponse) -> CannotAttach:
    """More connections wait at the lane's socket than it takes."""
    return CannotAttach(
        f"the lane's socket '{opened.socket_path}' took no connection within "
        f"{CONNECT_TIMEOUT_S:g} s: the worker does not accept",
        is_passing=True,
    )


def _connect(path: str, trusted: set[int]) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        with socket_address(path) as address:
            sock.connect(address)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        uid = _PEER_CREDENTIALS.unpack(credentials)[1]
        if uid not in trusted:
            expected = " or ".join(map(str, sorted(trusted)))
            raise CannotAttach(f"uid {uid} listens on '{path}', expected {expected}")
    except BaseException:
        sock.close()
        raise
    return sock


def _trusted_uids(address: str) -> set[int]:
    """Root, ourselves, and whoever owns the gRPC socket that we were told to call."""
    trusted = {0, os.geteuid()}
    grpc_socket = unix_path(address)
    if grpc_socket is not None:
        with contextlib.suppress(OSError):  # its server has just gone; connecting will say so
            trusted.add(os.stat(grpc_socket).st_uid)
    return trusted


def _fault_of(path: str, error: OSError) -> CannotAttach:
    if error.errno in (errno.EACCES, errno.EPERM):
        return CannotAttach(
            f"permission denied: uid {os.geteuid()} may not connect to '{path}'; the server's "
            f"--lane-uid says who may"
        )
    if error.errno == errno.ECONNREFUSED:
        return CannotAttach(f"nobody listens on the lane's socket '{path}'", is_passing=True)
    text = (error.strerror or str(error)).lower()
    return CannotAttach(f"cannot connect to the lane's socket '{path}': {text}")


def _not_there(address: str, opened: sessions_pb2.OpenSessionResponse) -> CannotAttach:
    looked = " and ".join(f"'{path}'" for path in socket_candidates(address, opened))
    return CannotAttach(
        f"the lane's socket is not at {looked or 'any path'}: the server at {address} is on "
        f"another host, or its socket's folder is not mounted in this container"
    )
