# SPDX-License-Identifier: Apache-2.0
"""Processes that tests kill, and what the server holds before and after."""

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from support.lane_peer import connect

# Forked from one process that has imported everything and started no thread: 4 ms each.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["support.dying", "support.handing_over", "support.killable", "support.load", "pytest"]
)

ANSWER_S_MAX = 30


def _start_forkserver() -> None:
    """Python 3.11 imports the modules before it takes our sys.path over, and says nothing where it
    finds none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        forkserver.ensure_running()


class Killable:
    """A process that does what it was told to and talks over a pipe."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        _start_forkserver()
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def hear(self) -> Any:
        """What it says next. Raises EOFError when it has ended."""
        assert self.pipe.poll(ANSWER_S_MAX), "it says nothing"
        return self.pipe.recv()

    def ask(self, what: Any) -> Any:
        self.pipe.send(what)
        return self.hear()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.join()


@contextlib.contextmanager
def killable(work: Callable[..., None], *arguments: Any) -> Iterator[Killable]:
    """work: a function of a module, called there with a pipe and the arguments."""
    child = Killable(work, *arguments)
    try:
        yield child
    finally:
        child.kill()
        child.pipe.close()


def warm_up() -> None:
    """The first process may take seconds on a busy machine, and a token is not good for many."""
    with killable(_say_so) as first:
        assert first.hear()


def _say_so(pipe: Connection) -> None:
    pipe.send(True)


class Anchor(Killable):
    """A process that has connected to the lane and handed its socket to the test, which so speaks
    in its name. To the server, its death is the client's.
    """

    def __init__(self, path: str, uid: int | None = None) -> None:
        super().__init__(_connect_for_parent, path, uid)
        fd = reduction.recv_handle(self.pipe)
        self.sock = socket.socket(fileno=fd)


def _connect_for_parent(pipe: Connection, path: str, uid: int | None) -> None:
    folder, name = os.path.split(path)
    os.chdir(folder)  # another user may not get there step by step
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    with connect(name) as sock:
        reduction.send_handle(pipe, sock.fileno(), None)
    pipe.poll(None)


def until(is_so: Callable[[], bool], what: Callable[[], object] = lambda: "") -> None:
    deadline_s = time.monotonic() + ANSWER_S_MAX
    while not is_so():
        assert time.monotonic() < deadline_s, what()
        time.sleep(0.01)
