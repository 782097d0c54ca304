# SPDX-License-Identifier: Apache-2.0
"""A worker with two lanes, and a process at the other end of each: a front, and a direct caller.

The front here is the server's own inference path, gRPC to lane, without what a benchmark does not
need. The caller does what a co-located client does: small calls straight to the worker.
"""

import asyncio
import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc

from bench.measure import Slice, as_latencies
from bench.servers import READY_S_MAX
from thirdrail.lane.aio import AsyncLane
from thirdrail_server.config import ServerConfig, WorkerConfig
from thirdrail_server.control_channel import ChannelLimits, open_channel
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.control.load_source import LoadSource, prepare
from thirdrail_server.front.dispatch import Dispatcher
from thirdrail_server.front.listeners import channel_options
from thirdrail_server.front.native_inference import NativeInference

MODEL = "identity"
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(slots=True)
class TwoLanes:
    """address: the front's gRPC address. caller: does small calls on the second lane."""

    address: str
    caller: "LaneCaller"


@contextlib.contextmanager
def worker_with_two_lanes(repository: Path, folder: Path, request: bytes) -> Iterator[TwoLanes]:
    """The worker serves the model `identity`; the caller sends `request`."""
    ours, theirs = _SPAWN.Pipe()
    address = f"unix:{folder / 'front.sock'}"
    front = _SPAWN.Process(target=_front, args=(theirs, repository, address), daemon=True)
    front.start()
    theirs.close()
    if not ours.poll(READY_S_MAX):
        raise RuntimeError("the front with two lanes did not start")
    caller = LaneCaller(ours.recv(), request)
    try:
        yield TwoLanes(address, caller)
    finally:
        caller.close()
        ours.close()
        front.join()


class LaneCaller:
    """A process with a lane of its own to a worker."""

    def __init__(self, lane: socket.socket, request: bytes) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_caller, args=(theirs, lane, request), daemon=True)
        self._process.start()
        theirs.close()
        lane.close()

    def run(self, seconds: float) -> Slice:
        """One small call after the other for so long."""
        self._pipe.send(seconds)
        done = self._pipe.recv()
        assert isinstance(done, Slice)
        return done

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


# In the front's process


def _front(pipe: Connection, repository: Path, address: str) -> None:
    asyncio.run(_serve(pipe, repository, address))


async def _serve(pipe: Connection, repository: Path, address: str) -> None:
    control, worker_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    worker_ends = [worker_control, *(theirs for _, theirs in pairs)]
    process = _start_worker([each.fileno() for each in worker_ends])
    for each in worker_ends:
        each.close()
    channel = await open_channel(control, ChannelLimits(), on_close=lambda: None)
    load = prepare(MODEL, LoadSource(repository)).command
    await channel.call("load", load.to_fields())
    config = ServerConfig(repository)
    dispatcher = Dispatcher(Catalog(config.control.models_max, config.control.watchers_max))
    dispatcher.attach(await AsyncLane.attach(pairs[0][0]), config.worker.name)
    native = NativeInference(
        dispatcher, stream_requests_in_flight_max=config.stream_requests_in_flight_max
    )
    server = grpc.aio.server(options=channel_options(config))
    server.add_generic_rpc_handlers((native.handler(),))
    server.add_insecure_port(address)
    await server.start()
    pipe.send(pairs[1][0])
    await asyncio.get_running_loop().run_in_executor(None, _wait_for_the_end, pipe)
    await server.stop(None)
    await channel.close()
    process.wait()


def _start_worker(fds: list[int]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "thirdrail_server.worker", "--front-pid", str(os.getpid())]
    command += ["--config", WorkerConfig().to_json(), "--control-fd", str(fds[0])]
    for fd in fds[1:]:
        command += ["--lane-fd", str(fd)]
    return subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)


def _wait_for_the_end(pipe: Connection) -> None:
    with contextlib.suppress(EOFError):
        pipe.recv()


# In the caller's process


def _caller(pipe: Connection, sock: socket.socket, request: bytes) -> None:
    asyncio.run(_call(pipe, sock, request))


async def _call(pipe: Connection, sock: socket.socket, request: bytes) -> None:
    lane = await AsyncLane.attach(sock)
    with contextlib.suppress(EOFError):
        while True:
            seconds = pipe.recv()  # blocks the loop, which has nothing else to do
            until_ns = time.monotonic_ns() + int(seconds * 1e9)
            pipe.send(await _slice(lane, request, until_ns))


async def _slice(lane: AsyncLane, request: bytes, until_ns: int) -> Slice:
    latencies: list[int] = []
    cpu_started = time.process_time()
    now_ns = started_ns = time.monotonic_ns()
    while now_ns < until_ns:
        (await lane.call_bytes(request)).release()
        before_ns, now_ns = now_ns, time.monotonic_ns()
        latencies.append(now_ns - before_ns)
    cpu_s = time.process_time() - cpu_started
    return Slice(as_latencies(latencies), (now_ns - started_ns) / 1e9, cpu_s)
