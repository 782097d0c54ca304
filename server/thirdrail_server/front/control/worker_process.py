# SPDX-License-Identifier: Apache-2.0
"""One worker process: starts it with its sockets, notices its death, ends it for certain.

The process is watched through a pidfd, which the event loop can wait for. It runs in a process
group of its own, so that Ctrl-C in a terminal reaches the front alone, which then ends the worker
when the last request is answered.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from thirdrail_server.exit_codes import MEANINGS

log = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "thirdrail_server.worker")


@dataclass(slots=True, eq=False)
class WorkerProcess:
    """A started worker. Create it with `start_worker` and end it with `stop`.

    control, lane: the front's ends. Whoever takes them over closes them.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket  # SOCK_STREAM
    lane: socket.socket  # SOCK_SEQPACKET, not blocking
    _pidfd: int
    _ended: asyncio.Future[str] = field(default_factory=asyncio.Future)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return not self._ended.done()

    async def wait(self) -> str:
        """Wait until the process has ended and is reaped. Returns how: "signal 11 (SIGSEGV)"."""
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        if self.is_alive:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def stop(self, grace_s: float) -> str:
        """Wait for a worker whose control channel was closed; kill it after `grace_s` seconds."""
        try:
            return await asyncio.wait_for(self.wait(), grace_s)
        except TimeoutError:
            log.warning("pid %d did not end within %g s: killed", self.pid, grace_s)
            self.kill()
        return await self.wait()

    def _on_death(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended.set_result(exit_text(self.process.wait()))


def start_worker(
    arguments: Sequence[str],
    command: Sequence[str] = WORKER_COMMAND,
    *,
    lane_listener: socket.socket | None = None,
    environment: Mapping[str, str] | None = None,
) -> WorkerProcess:
    """Start `command --control-fd N --lane-fd M *arguments` and watch it.

    lane_listener: passed on as `--lane-listen-fd`; it stays the caller's and outlives the worker.
    environment: the worker's variables; None: ours.
    Must be called on the main thread's event loop: a worker ends with the thread that started it.
    Raises OSError when the process cannot be started.
    """
    control, worker_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    lane, worker_lane = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = [worker_control.fileno(), worker_lane.fileno()]
    numbered = ["--control-fd", str(fds[0]), "--lane-fd", str(fds[1])]
    if lane_listener is not None:
        fds.append(lane_listener.fileno())
        numbered += ["--lane-listen-fd", str(fds[2])]
    try:
        process = subprocess.Popen(
            [*command, *numbered, *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            process_group=0,
            env=environment,
        )
    except BaseException:
        control.close()
        lane.close()
        raise
    finally:
        worker_control.close()
        worker_lane.close()
    control.setblocking(False)
    lane.setblocking(False)
    worker = WorkerProcess(process, control, lane, os.pidfd_open(process.pid))
    asyncio.get_running_loop().add_reader(worker._pidfd, worker._on_death)
    return worker


def exit_text(returncode: int) -> str:
    """How a process ended, in words, from its Popen.returncode."""
    if returncode >= 0:
        meaning = MEANINGS.get(returncode)
        return f"exit status {returncode}" + (f" ({meaning})" if meaning else "")
    try:
        return f"signal {-returncode} ({signal.Signals(-returncode).name})"
    except ValueError:  # a real-time signal has no name
        return f"signal {-returncode}"
