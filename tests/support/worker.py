# SPDX-License-Identifier: Apache-2.0
"""A real worker process without a front: its control channel and lanes are in the test's hands."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from support.lane_peer import LanePeer, connect
from thirdrail.dtypes import Buffer
from thirdrail.lane.aio import AsyncLane, Reply
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import metrics_pb2, sessions_pb2
from thirdrail_server.config import WorkerConfig
from thirdrail_server.control_channel import ChannelLimits, ControlChannel, open_channel
from thirdrail_server.control_messages import LoadedModel, OpenedSession, message_of_text
from thirdrail_server.front.control.load_source import LoadSource, prepare
from thirdrail_server.repository.layout import scan

T = TypeVar("T")

CALL_S_MAX = 60
STOP_S_MAX = 40


@dataclass(slots=True)
class RunningWorker:
    """A worker, its models loaded. `run` runs a coroutine on the loop that its channel lives on."""

    process: subprocess.Popen[bytes]
    loop: asyncio.AbstractEventLoop
    control: ControlChannel
    sockets: list[socket.socket]  # lanes that nobody has said hello on; the first is the front's
    lanes: list[AsyncLane] = field(default_factory=list)
    lane_path: Path | None = None  # where it listens for clients

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(CALL_S_MAX)

    def attach(self) -> AsyncLane:
        """A lane on the next unused socket."""
        lane = self.run(AsyncLane.attach(self.sockets.pop(0)))
        self.lanes.append(lane)
        return lane

    def open_session(self) -> OpenedSession:
        """A token, as OpenSession gets it."""
        return OpenedSession.from_fields(self.run(self.control.call("open session")))

    def peer(self, **fields: Any) -> LanePeer:
        """Attached as a client of the host, with a token."""
        assert self.lane_path is not None
        peer = LanePeer(connect(self.lane_path))
        peer.attach(token=self.open_session().token, **fields)
        return peer

    def sessions(self) -> dict[int, sessions_pb2.SessionInfo]:
        """By number."""
        texts = self.run(self.control.call("list sessions"))["sessions"]
        infos = [message_of_text(sessions_pb2.SessionInfo, text) for text in texts]
        return {each.session: each for each in infos}

    def load(self, repository: Path, *names: str) -> dict[str, LoadedModel]:
        wanted = names or sorted(scan(repository))
        return {name: self.run(self._load(name, repository)) for name in wanted}

    async def _load(self, name: str, repository: Path) -> LoadedModel:
        command = prepare(name, LoadSource(repository)).command
        return LoadedModel.from_fields(await self.control.call("load", command.to_fields()))

    def unload(self, name: str) -> None:
        self.run(self.control.call("unload", {"name": name}))

    def status(self) -> metrics_pb2.WorkerStatus:
        answer = self.run(self.control.call("status"))
        return message_of_text(metrics_pb2.WorkerStatus, answer["status"])

    def counters(self) -> dict[str, metrics_pb2.ModelCounters]:
        texts = self.run(self.control.call("counters"))["models"]
        counters = [message_of_text(metrics_pb2.ModelCounters, text) for text in texts]
        return {each.name: each for each in counters}

    def fd_count(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def infer(
        self,
        lane: AsyncLane,
        request: pb.InferRequest,
        data: Sequence[Buffer | None] = (),
        *,
        flow: int = 0,
    ) -> Reply:
        return self.run(lane.call(request, data, flow=flow))


@contextlib.contextmanager
def running_worker(
    config: WorkerConfig | None = None,
    *,
    lanes: int = 1,
    log: Path | None = None,
    listen: Path | None = None,
    module: str = "thirdrail_server.worker",
) -> Iterator[RunningWorker]:
    """A worker with so many lanes, without models.

    log: where it logs to; None: standard error.
    listen: where it takes clients with tokens.
    module: what runs as the worker.
    """
    config = config or WorkerConfig()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="worker's peer", daemon=True)
    thread.start()
    control, worker_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(lanes)]
    fds = [worker_control.fileno(), *(theirs.fileno() for _, theirs in pairs)]
    command = [sys.executable, "-m", module, "--front-pid", str(os.getpid())]
    command += ["--config", config.to_json(), "--control-fd", str(fds[0])]
    for fd in fds[1:]:
        command += ["--lane-fd", str(fd)]
    with contextlib.ExitStack() as stack:
        if listen is not None:
            listener = stack.enter_context(_listener(listen))
            command += ["--lane-listen-fd", str(listener.fileno())]
            fds.append(listener.fileno())
        stderr = stack.enter_context(log.open("wb")) if log is not None else None
        process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, stderr=stderr)
    for theirs in (worker_control, *(theirs for _, theirs in pairs)):
        theirs.close()
    channel = asyncio.run_coroutine_threadsafe(
        open_channel(control, ChannelLimits(), on_close=lambda: None), loop
    ).result(CALL_S_MAX)
    worker = RunningWorker(process, loop, channel, [ours for ours, _ in pairs])
    worker.lane_path = listen
    try:
        yield worker
    finally:
        for lane in worker.lanes:
            loop.call_soon_threadsafe(lane.close)
        for sock in worker.sockets:
            sock.close()
        worker.run(channel.close())
        try:
            process.wait(STOP_S_MAX)
        finally:
            process.kill()
            process.wait()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    return listener
