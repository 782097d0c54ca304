# SPDX-License-Identifier: Apache-2.0
"""The worker process: lanes and control on one loop, until the front asks it to end or is gone.

The front starts it with `python -m thirdrail_server.worker` and inherited sockets. It never
outlives the front: a thread watches for the front's death, and the end of file on the control
channel ends it as well. It owns no name in the file system.
"""

import asyncio
import contextlib
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thirdrail.v1 import metrics_pb2
from thirdrail_engines import use_one_arena
from thirdrail_engines.engine import DeviceLost
from thirdrail_server import exit_codes
from thirdrail_server.busy_poll import new_loop
from thirdrail_server.config import WorkerConfig
from thirdrail_server.control_channel import ChannelLimits
from thirdrail_server.logs import configure_logging
from thirdrail_server.worker.control import serve_control
from thirdrail_server.worker.models import ModelTable
from thirdrail_server.worker.sessions import SessionTable

log = logging.getLogger(__name__)

# A waiting thread gets the GIL after this long, not after Python's 5 ms: a lane call takes 0.1 ms.
GIL_SWITCH_S = 0.0002
FRONT_DEATH_S_MAX = 0.2


@dataclass(frozen=True, slots=True)
class InheritedSockets:
    """File descriptors that the front passed. The first lane is the front's own."""

    control_fd: int
    lane_fds: tuple[int, ...]
    front_pid: int
    lane_listen_fd: int | None = None  # where other clients come in; the front keeps it as well
    leftovers: tuple[Path, ...] = ()  # of the front, to be removed if it is killed


def run_worker(config: WorkerConfig, inherited: InheritedSockets) -> int:
    """Run until the front is gone or says so. Returns the process's exit status."""
    use_one_arena()  # before the first thread
    watch = _die_with(inherited.front_pid, inherited.leftovers)
    configure_logging(process=f"worker {config.name}")
    sys.setswitchinterval(GIL_SWITCH_S)
    allow_descriptors()
    # A terminal's Ctrl-C and its end reach the whole group, and a service manager's SIGTERM every
    # process of the service: the front decides how its workers end, which may still have requests
    # to answer.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with asyncio.Runner(loop_factory=lambda: new_loop(config.busy_poll_us)) as runner:
        runner.run(_serve(config, inherited))
    # A dying front's sockets close a moment before its death is known: then this is its death, and
    # the watch has something to remove.
    watch.join(FRONT_DEATH_S_MAX)
    # Engines that are still running must not hold up the end; nobody waits for them.
    logging.shutdown()
    os._exit(0)


def allow_descriptors() -> None:
    """As many as the system lets us have: a session takes two, and one for each piece of memory; a
    connection of the front takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _die_with(front_pid: int, leftovers: Sequence[Path]) -> threading.Thread:
    """End this process as soon as the front has ended, and remove what it could not.

    A thread and not a parent-death signal: a killed front leaves its socket's name behind, and this
    process is the only one left to remove it.
    """
    pidfd = os.pidfd_open(front_pid)
    if os.getppid() != front_pid:  # it died before it could be watched
        os._exit(1)

    ours = {path: _identity(path) for path in leftovers}

    def watch() -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
        for path, identity in ours.items():
            if _identity(path) == identity:  # else another server has the place by now
                path.unlink(missing_ok=True)
        os._exit(1)

    thread = threading.Thread(target=watch, name="front watch", daemon=True)
    thread.start()
    return thread


def _identity(path: Path) -> tuple[int, int] | None:
    """What another file of this name would not have: an inode's number comes again, and soon."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


async def _serve(config: WorkerConfig, inherited: InheritedSockets) -> None:
    ended = asyncio.Event()

    def on_device_lost(error: DeviceLost) -> None:
        if not ended.is_set():
            log.critical("%s; this process ends, and its front starts another", error)
        lost.append(error)
        ended.set()

    lost: list[DeviceLost] = []
    models = ModelTable(config, on_device_lost)
    sessions = SessionTable(config, models, on_device_lost)
    for number, fd in enumerate(inherited.lane_fds):
        sessions.inherit(socket.socket(fileno=fd), is_front=number == 0)
    if inherited.lane_listen_fd is not None:
        sessions.listen(socket.socket(fileno=inherited.lane_listen_fd))

    def status() -> metrics_pb2.WorkerStatus:
        status = metrics_pb2.WorkerStatus(
            name=config.name,
            pid=os.getpid(),
            is_serving=True,
            resident_bytes=_resident_bytes(),
            model_bytes=models.memory().total,
        )
        sessions.describe(status)
        return status

    control = socket.socket(fileno=inherited.control_fd)
    # Held until the end: the loop's own references are weak, and the collector would take a channel
    # that nobody else has, in the middle of its reading.
    channel = await serve_control(control, models, status, ended.set, ChannelLimits(), sessions)
    log.debug("ready for models")
    await ended.wait()
    if lost:
        # At once: whatever is still under way on the device may never end, and waiting for it
        # would only delay what answers all the others, this process's death.
        logging.shutdown()
        os._exit(exit_codes.DEVICE_LOST)
    del channel
    await models.close()
    sessions.close()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
