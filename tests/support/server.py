# SPDX-License-Identifier: Apache-2.0
"""Real servers for tests: `thirdrail serve` as a child process, on a socket and a free port."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from thirdrail.v1 import models_pb2, models_pb2_grpc

READY_S_MAX = 60
TESTS = Path(__file__).parent.parent
STOP_S_MAX = 40
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass(slots=True)
class RunningServer:
    process: subprocess.Popen[bytes]
    repository: Path
    socket: Path
    address: str  # host:port
    log: Path

    @property
    def url(self) -> str:
        return f"unix:{self.socket}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def worker_pid(self) -> int:
        """Raises StopIteration when there is no worker at the moment."""
        children = psutil.Process(self.pid).children()
        return next(c.pid for c in children if "thirdrail_server.worker" in c.cmdline())

    def channel(self, *, tcp: bool = False) -> grpc.Channel:
        return grpc.insecure_channel(self.address if tcp else self.url, UNLIMITED)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_S_MAX)
        finally:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that the system gives to nobody else until the end, and on which a server can listen:
    with SO_REUSEADDR on both sides, it may where another has bound and does not listen."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


@contextlib.contextmanager
def running_server(
    repository: Path,
    folder: Path,
    arguments: Sequence[str] = (),
    *,
    wait: bool = True,
    module: str = "thirdrail",
) -> Iterator[RunningServer]:
    """A server for `repository`; its socket and log lie in `folder`. Stopped on leaving.

    module: what to run in place of thirdrail; it finds the tests' own modules.
    wait: until every startup model is ready or has failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / "s" / "grpc.sock", folder / "log.txt"
    with reserved_port() as port:
        command = [sys.executable, "-m", module, "serve", str(repository)]
        command += [] if "--no-socket" in arguments else [f"--socket={path}"]
        command += [] if "--no-tcp" in arguments else [f"--address=127.0.0.1:{port}"]
        command += arguments
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(TESTS)} if module != "thirdrail" else None,
            )
        server = RunningServer(process, repository, path, f"127.0.0.1:{port}", log)
        try:
            if wait:
                wait_until_settled(server)
            yield server
        finally:
            if process.poll() is None:
                server.stop()


def wait_until_settled(server: RunningServer, *, seconds: float = READY_S_MAX) -> None:
    """Until no model is loading. Fails with the server's log when it ended or takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended:\n{server.log_text()}")
        if server.socket.exists():
            with server.channel() as channel, contextlib.suppress(grpc.RpcError):
                listed = models_pb2_grpc.ModelsStub(channel).List(
                    models_pb2.ListRequest(), timeout=5
                )
                states = {model.state for model in listed.models}
                if states and models_pb2.MODEL_STATE_LOADING not in states:
                    return
        time.sleep(0.05)
    raise AssertionError(f"the server was not ready after {seconds} s:\n{server.log_text()}")
