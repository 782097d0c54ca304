# SPDX-License-Identifier: Apache-2.0
"""Who may load and unload models, and who may change what the server logs.

- Models: nobody, unless the server runs with --model-control explicit.
- Over TCP: whoever showed a client certificate that TLS verified.
- Over the Unix socket: the owner of the server. gRPC does not tell who is at the other end of a
  Unix socket, but the kernel lets only those connect who may write the socket and enter its
  folder. So control is allowed as long as file modes leave that to the owner (and root) alone, and
  refused as soon as the socket and its folder are opened for a group or for all, because callers
  are then not told apart. Modes are looked at per call. A connection outlives a change of mode:
  a server whose socket was once open to others is to be restarted before it is trusted again.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from thirdrail.errors import FailedPrecondition, PermissionDenied
from thirdrail_server.config import ModelControlMode

NOT_ALLOWED = "explicit model load / unload is not allowed"
OFF = f"{NOT_ALLOWED}: model control is off; start the server with --model-control explicit"
POLLING = (
    f"{NOT_ALLOWED} if polling is enabled; start the server with --model-control explicit instead"
)


class ControlIsOff(FailedPrecondition):
    """This server loads and unloads nothing on demand, and will not before it is restarted."""


class Peer(Protocol):
    """What is asked of a call's context."""

    def peer(self) -> str: ...
    def auth_context(self) -> Mapping[Any, Any]: ...


def refuse_unless_explicit(mode: ModelControlMode) -> None:
    """Raises ControlIsOff when this server loads and unloads nothing on demand."""
    if mode is ModelControlMode.NONE:
        raise ControlIsOff(OFF)
    if mode is ModelControlMode.POLL:
        raise ControlIsOff(POLLING)


@dataclass(frozen=True, slots=True)
class ControlAccess:
    mode: ModelControlMode
    socket: Path | None  # the only Unix socket that the server listens on

    def authorize(self, context: Peer) -> None:
        """Let the caller control models, or raise ControlIsOff or PermissionDenied."""
        refuse_unless_explicit(self.mode)
        self._require_trusted(context, "loading and unloading")

    def authorize_settings(self, context: Peer) -> None:
        """Let the caller change what the server logs, in any mode, or raise PermissionDenied."""
        self._require_trusted(context, "changing log settings")

    def _require_trusted(self, context: Peer, action: str) -> None:
        if context.peer().startswith("unix:"):
            self._require_private_socket(action)
        elif not _has_certificate(context):
            raise PermissionDenied(
                f"{action} over TCP needs a client certificate that the server verified; "
                f"use one, or the server's Unix socket"
            )

    def _require_private_socket(self, action: str) -> None:
        if self.socket is None:
            raise PermissionDenied(f"{action} is not allowed over this Unix socket")
        try:
            is_private = is_owners_alone(self.socket)
        except OSError as error:
            raise PermissionDenied(
                f"the server cannot tell who may use its socket '{self.socket}': {error.strerror}"
            ) from None
        if not is_private:
            raise PermissionDenied(
                f"{action} is not allowed over the server's socket '{self.socket}', because others "
                f"than its owner may use it; chmod 700 its folder and restart the server"
            )


def _has_certificate(context: Peer) -> bool:
    # A certificate is only ever there when the server asks for one, and then TLS has verified it.
    auth = context.auth_context()
    is_tls = b"ssl" in auth.get("transport_security_type", ())
    return is_tls and any(auth.get("x509_pem_cert", ()))


def is_owners_alone(path: Path) -> bool:
    """Whether only the user of this process, and root, can connect to the Unix socket `path`.

    An access list widens no further than the mode's group bits show. Raises OSError.
    """
    for where, others in ((path, stat.S_IWGRP | stat.S_IWOTH), (path.parent, 0o033)):
        found = where.stat()
        if found.st_uid == os.geteuid() and not found.st_mode & others:
            return True
    return False
