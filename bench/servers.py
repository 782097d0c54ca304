# SPDX-License-Identifier: Apache-2.0
"""The servers under measurement, each in processes of its own, on TCP and on a Unix socket."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

READY_S_MAX = 60
STOP_S_MAX = 40
POLL_S = 0.01
HOST = "127.0.0.1"


class NotReady(Exception):
    """A server did not become ready in time."""


@dataclass(slots=True)
class Server:
    """A running server. `processes` has one entry per role: Thirdrail's front and its worker."""

    name: str
    process: subprocess.Popen[bytes]
    unix: str  # gRPC address
    tcp: str  # gRPC address
    processes: list[psutil.Process]
    start_s: float = 0.0  # from its start until it was ready

    def cpu_s(self) -> tuple[float, ...]:
        """CPU seconds so far, user and system, per process."""
        times = [process.cpu_times() for process in self.processes]
        return tuple(each.user + each.system for each in times)

    def address(self, transport: str) -> str:
        return {"TCP": self.tcp, "UDS": self.unix}[transport]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def thirdrail(
    repository: Path,
    folder: Path,
    arguments: Sequence[str] = (),
    *,
    module: str = "thirdrail",
    python_path: Path | None = None,
) -> Iterator[Server]:
    """`thirdrail serve`, every model ready. Its socket and its log are put into `folder`.

    module: what to run in its place; python_path: where it is found.
    """
    path, port = folder / "s" / "thirdrail.sock", free_port()
    command = [sys.executable, "-m", module, "serve", str(repository), f"--socket={path}"]
    command += [f"--address={HOST}:{port}", "--log-level=warning", *arguments]
    variables = dict(os.environ)
    if python_path is not None:
        variables["PYTHONPATH"] = str(python_path)
    log = folder / "thirdrail.log"
    with _running("thirdrail", command, path, port, log, variables) as server:
        started = time.monotonic()
        wait_until_serving(server)
        server.start_s = time.monotonic() - started
        server.processes += worker_processes(server.processes[0])
        yield server


def worker_processes(front: psutil.Process) -> list[psutil.Process]:
    """Without the helpers that come and go while models are loaded."""
    return [each for each in front.children() if "thirdrail_server.worker" in each.cmdline()]


@contextlib.contextmanager
def echo(kind: str, folder: Path) -> Iterator[Server]:
    """A bare echo: kind "aio" or "sync"."""
    path, port = folder / f"{kind}.sock", free_port()
    command = [sys.executable, "-m", "bench.echo_servers", kind, f"unix:{path}", f"{HOST}:{port}"]
    with _running(f"{kind} echo", command, path, port, folder / f"{kind}.log") as server:
        wait_until_connected(server.unix)
        yield server


@contextlib.contextmanager
def _running(
    name: str,
    command: Sequence[str],
    path: Path,
    port: int,
    log: Path,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=variables,
        )
    try:
        first = psutil.Process(process.pid)
        yield Server(name, process, f"unix:{path}", f"{HOST}:{port}", [first])
    except (grpc.FutureTimeoutError, NotReady):
        raise RuntimeError(f"{name} was not ready; its log:\n{log.read_text()}") from None
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until_connected(address: str) -> None:
    with grpc.insecure_channel(address, _EAGER) as channel:
        grpc.channel_ready_future(channel).result(READY_S_MAX)


def wait_until_serving(server: Server) -> None:
    """Until grpc.health.v1 says that the whole server serves."""
    path = Path(server.unix.removeprefix("unix:"))
    deadline = time.monotonic() + READY_S_MAX
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    with grpc.insecure_channel(server.unix, _EAGER) as channel:
        grpc.channel_ready_future(channel).result(READY_S_MAX)
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=READY_S_MAX
        )
        with contextlib.suppress(grpc.RpcError):
            for answer in watch:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
    raise NotReady(server.name)


# A connection that fails is tried again soon, not after gRPC's usual second.
_EAGER = [
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 20),
]
