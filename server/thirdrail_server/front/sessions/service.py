# SPDX-License-Identifier: Apache-2.0
"""thirdrail.v1.Sessions: the way onto the lane, and who is on it.

The front only introduces: it asks the worker to expect a client, and tells the client where. From
then on the two talk to each other.
"""
# ruff: noqa: N802 - the methods have the names of the protocol's calls

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from thirdrail.errors import FailedPrecondition, NotFound, ThirdrailError
from thirdrail.v1 import sessions_pb2 as pb
from thirdrail.v1 import sessions_pb2_grpc
from thirdrail_engines.cuda.sharing_here import sharing_here
from thirdrail_server.config import ServerConfig
from thirdrail_server.control_messages import OpenedSession, message_of_text
from thirdrail_server.front.control.supervisor import Supervisor
from thirdrail_server.front.sessions.probe import answer_probe
from thirdrail_server.front.statuses import answering
from thirdrail_server.repository.device_choice import Device

Context = grpc.aio.ServicerContext[Any, Any]

NO_LANE = "the server offers no lane (it runs with --no-lane)"
NO_SOCKET = "the server offers no lane: it has no Unix socket (--socket PATH)"


class SessionsServicer(sessions_pb2_grpc.SessionsServicer):
    """workers: the first is that of clients who name none."""

    def __init__(self, config: ServerConfig, workers: Sequence[Supervisor]) -> None:
        self._config = config
        self._workers = {worker.name: worker for worker in workers}
        self._first = workers[0]
        self._lane_paths: Mapping[str, Path] = {}
        self._tcp_address: str | None = None

    def listening(self, tcp_address: str | None, lane_paths: Mapping[str, Path]) -> None:
        """Where the server listens, which it only knows once it does. lane_paths: by worker."""
        self._tcp_address = tcp_address
        self._lane_paths = lane_paths

    @answering
    async def OpenSession(
        self, request: pb.OpenSessionRequest, context: Context
    ) -> pb.OpenSessionResponse:
        worker = self._workers.get(request.worker) if request.worker else self._first
        if worker is None:
            there = ", ".join(f"'{name}'" for name in self._workers)
            raise NotFound(f"there is no worker '{request.worker}', this server has {there}")
        why_not = self._why_no_lane(context.peer())
        path = self._lane_paths.get(worker.name)
        if why_not or path is None:
            raise FailedPrecondition(why_not)
        opened = OpenedSession.from_fields(await worker.ask("open session"))
        return pb.OpenSessionResponse(
            session=opened.session,
            token=opened.token,
            token_life_ms=opened.token_life_ms,
            socket_name=path.name,
            socket_path=str(path.absolute()),
            worker=worker.name,
            workers=self._workers,
        )

    @answering
    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        lists = await asyncio.gather(*map(_sessions_of, self._workers.values()))
        listed = pb.ListSessionsResponse()
        for each in lists:
            listed.MergeFrom(each)
        return listed

    @answering
    async def Probe(self, request: pb.ProbeRequest, context: Context) -> pb.ProbeResponse:
        # The driver may take its time to answer the first time.
        found, why_no_device = await asyncio.to_thread(sharing_here)
        ours = {
            uuid: sharing for uuid, sharing in found.items() if Device(uuid).worker in self._workers
        }
        return answer_probe(
            request,
            self._config,
            tcp_address=self._tcp_address,
            lane_address=", ".join(str(path.absolute()) for path in self._lane_paths.values()),
            why_no_lane=self._why_no_lane(context.peer()),
            has_client_shm=self._config.allow_client_shm,
            devices=ours,
            why_no_device=why_no_device,
        )

    def _why_no_lane(self, caller: str) -> str:
        """Empty where there is one for this caller."""
        if not self._config.lane:
            return NO_LANE
        if not self._lane_paths:
            return NO_SOCKET
        if not is_local(caller):
            return (
                f"the lane is for clients on the server's host, this call came from {caller}; use "
                "the server's Unix socket or its loopback address"
            )
        return ""


async def _sessions_of(worker: Supervisor) -> pb.ListSessionsResponse:
    try:
        answer = await worker.ask("list sessions")
    except ThirdrailError as error:
        return pb.ListSessionsResponse(unheard={worker.name: error.message})
    sessions = [message_of_text(pb.SessionInfo, text) for text in answer["sessions"]]
    for each in sessions:
        each.worker = worker.name
    return pb.ListSessionsResponse(sessions=sessions)


def is_local(caller: str) -> bool:
    """Whether gRPC's name of a peer is one that only this host can have."""
    kind, _, address = unquote(caller).partition(":")
    if kind == "unix":
        return True
    return kind in ("ipv4", "ipv6") and address.startswith(
        ("127.", "[::1]:", "[::ffff:127.", "::1:")
    )
