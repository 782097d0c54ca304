# SPDX-License-Identifier: Apache-2.0
"""Where the local server is: one answer for the server that listens and for the client that looks.

A client without an address asks $THIRDRAIL_URL, then the Unix socket in the runtime directory, then
127.0.0.1:8001. A socket counts only when its file and the process behind it belong to the caller or
to root: anybody may create a path below /tmp.
"""

import os
import re
import socket
import stat
import struct
from pathlib import Path

from thirdrail.errors import InvalidArgument
from thirdrail.failures import Unreachable, with_note
from thirdrail.option_values import require_text

URL_VARIABLE = "THIRDRAIL_URL"
SOCKET_NAME = "grpc.sock"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8001
USERS_ROOT = Path("/run/user")
TEMPORARY_ROOT = Path("/tmp")  # noqa: S108 a folder's owner is checked before it is used

_PROBE_SECONDS_MAX = 1.0
_SCHEMES = ("unix:", "dns:", "ipv4:", "ipv6:")


def default_socket_path() -> Path:
    """Where the server of this user listens unless it is told otherwise. Nothing is created."""
    return _socket_candidates()[0]


def find_address(url: str | None = None, *, sockets: bool = True) -> str:
    """The gRPC target to call: `url` or $THIRDRAIL_URL unchecked, else the first that answers.

    sockets: whether Unix sockets are looked for; they carry no TLS.
    Raises InvalidArgument for a url of no known form, Unreachable when nothing answers anywhere.
    """
    named = url or os.environ.get(URL_VARIABLE)
    if named:
        return parse_url(named)
    tried: list[str] = []
    for path in _socket_candidates() if sockets else ():
        fault = _socket_fault(path)
        if fault is None:
            return f"unix:{path}"
        tried.append(f"{path}: {fault}")
    fault = _port_fault(DEFAULT_HOST, DEFAULT_PORT)
    if fault is None:
        return f"{DEFAULT_HOST}:{DEFAULT_PORT}"
    tried.append(f"{DEFAULT_HOST}:{DEFAULT_PORT}: {fault}")
    raise with_note(
        Unreachable(
            f"found no server on this host. Tried {URL_VARIABLE}: not set; " + "; ".join(tried)
        )
    )


def url_of(given: str | os.PathLike[str] | None) -> str | None:
    """What a caller gave: a path is a socket's. Raises InvalidArgument for anything else."""
    if isinstance(given, os.PathLike):
        return os.path.abspath(given)
    if given is not None:
        require_text("the url of a server", given)
    return given


def parse_url(url: str) -> str:
    """`host:port`, `host`, `/path/of.sock`, `unix:/path` or any gRPC target -> the gRPC target."""
    if url.startswith("/"):
        return f"unix:{url}"
    if url.startswith(_SCHEMES):
        return url
    if "/" in url or not url.strip():
        raise InvalidArgument(
            f"cannot call '{url}', expected host:port or unix:/path/of/the.sock without http://"
        )
    if _is_bare_ipv6(url):
        return f"[{url}]:{DEFAULT_PORT}"
    host, colon, port = ("", "", "") if url.endswith("]") else url.rpartition(":")
    if not colon:
        return f"{url}:{DEFAULT_PORT}"
    if not (host and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 1 << 16):
        raise InvalidArgument(
            f"cannot call '{url}', expected host:port with a port from 1 to 65535"
        )
    return url


def _is_bare_ipv6(url: str) -> bool:
    return url.count(":") > 1 and not url.startswith("[")


def _socket_candidates() -> list[Path]:
    uid = os.getuid()
    folders = []
    if os.environ.get("XDG_RUNTIME_DIR"):
        folders.append(Path(os.environ["XDG_RUNTIME_DIR"]) / "thirdrail")
    if (USERS_ROOT / str(uid)).is_dir():
        folders.append(USERS_ROOT / str(uid) / "thirdrail")
    folders.append(TEMPORARY_ROOT / f"thirdrail-{uid}")
    return [folder / SOCKET_NAME for folder in dict.fromkeys(folders)]


def _socket_fault(path: Path) -> str | None:
    """Why this socket is not our server's, or None."""
    try:
        status = path.stat()
    except OSError as error:
        return _text_of(error)
    if not stat.S_ISSOCK(status.st_mode):
        return "not a socket"
    if not _is_trusted(status.st_uid):
        return f"belongs to uid {status.st_uid}, expected {os.getuid()} or root"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS_MAX)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return None  # somebody listens, and has more connections waiting than it takes
        except OSError as error:
            return _text_of(error)
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    uid = struct.unpack("3i", credentials)[1]
    return None if _is_trusted(uid) else f"uid {uid} listens, expected {os.getuid()} or root"


def _port_fault(host: str, port: int) -> str | None:
    try:
        socket.create_connection((host, port), timeout=_PROBE_SECONDS_MAX).close()
    except OSError as error:
        return _text_of(error)
    return None


def _is_trusted(uid: int) -> bool:
    return uid in (0, os.getuid())


def _text_of(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
