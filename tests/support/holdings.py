# SPDX-License-Identifier: Apache-2.0
"""What a running server holds for its clients: sessions, memory, leases, descriptors, mappings."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from support.killable import until
from support.server import RunningServer
from thirdrail.v1 import metrics_pb2, sessions_pb2
from thirdrail.v1.metrics_pb2_grpc import MetricsStub
from thirdrail.v1.sessions_pb2_grpc import SessionsStub

STATUS_S_MAX = 20


@dataclass(frozen=True, slots=True)
class Holdings:
    """sessions, leases and arena_bytes as the worker says; the rest as the kernel does."""

    sessions: int
    leases: int
    arena_bytes: int
    shared_bytes: int
    fds: int
    front_fds: int
    mappings: int
    mapped_bytes: int

    def is_within(self, other: "Holdings") -> bool:
        """No figure is above the other's."""
        return all(getattr(self, name) <= getattr(other, name) for name in self.__slots__)


class Watch:
    """Looks at a server from its start on: sessions that are there already are not counted."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._channel = server.channel()
        self._sessions = SessionsStub(self._channel)
        self._metrics = MetricsStub(self._channel)
        self._known = frozenset(each.session for each in self._listed())
        self.before = self.holdings()

    def _listed(self) -> list[sessions_pb2.SessionInfo]:
        request = sessions_pb2.ListSessionsRequest()
        return list(self._sessions.ListSessions(request, timeout=STATUS_S_MAX).sessions)

    def others(self) -> list[sessions_pb2.SessionInfo]:
        """Sessions that came since, tokens that nobody has used not among them."""
        opening = sessions_pb2.SESSION_STATE_OPENING
        listed = [each for each in self._listed() if each.state != opening]
        return [each for each in listed if each.session not in self._known]

    def of_pid(self, pid: int) -> sessions_pb2.SessionInfo:
        """The one session of a process."""
        (only,) = [each for each in self._listed() if each.pid == pid]
        return only

    def has(self, pid: int, is_so: Callable[[sessions_pb2.SessionInfo], bool]) -> bool:
        """Whether a process has one session, of which that is so."""
        found = [each for each in self._listed() if each.pid == pid]
        return len(found) == 1 and is_so(found[0])

    def tokens(self) -> int:
        """Issued, and neither used nor expired."""
        opening = sessions_pb2.SESSION_STATE_OPENING
        return sum(each.state == opening for each in self._listed())

    def snapshot(self) -> metrics_pb2.SnapshotResponse:
        return self._metrics.Snapshot(metrics_pb2.SnapshotRequest(), timeout=STATUS_S_MAX)

    def counters(self, model: str) -> metrics_pb2.ModelCounters:
        (only,) = [each for each in self.snapshot().models if each.name == model]
        return only

    def opened(self) -> sessions_pb2.OpenSessionResponse:
        return self._sessions.OpenSession(sessions_pb2.OpenSessionRequest(), timeout=STATUS_S_MAX)

    def holdings(self) -> Holdings:
        (status,) = self.snapshot().workers
        others = self.others()
        maps = [
            line.split()
            for line in Path(f"/proc/{status.pid}/maps").read_text().splitlines()
            if "memfd:thirdrail" in line
        ]
        return Holdings(
            sessions=status.sessions,
            leases=sum(each.leases for each in others),
            arena_bytes=status.arena_bytes,
            shared_bytes=status.shared_bytes,
            fds=_fds(status.pid),
            front_fds=_fds(self._server.pid),
            mappings=len(maps),
            mapped_bytes=sum(_size(fields[0]) for fields in maps),
        )

    def is_back(self) -> bool:
        return not self.others() and self.holdings().is_within(self.before)

    def until_back(self) -> None:
        """Until nothing is left of whoever came since."""
        until(self.is_back, lambda: f"{self.holdings()}, before {self.before}, {self.others()}")

    def close(self) -> None:
        self._channel.close()

    @property
    def channel(self) -> grpc.Channel:
        return self._channel


def _fds(pid: int) -> int:
    """Without pipes, which the lane has none of: those of model files' inspector come and go."""
    links = [_link(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return sum(not link.startswith("pipe:") for link in links)


def _link(path: str) -> str:
    with contextlib.suppress(FileNotFoundError):  # closed by now
        return os.readlink(path)
    return "pipe:"


def _size(span: str) -> int:
    first, _, end = span.partition("-")
    return int(end, 16) - int(first, 16)
