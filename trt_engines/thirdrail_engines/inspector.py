# SPDX-License-Identifier: Apache-2.0
"""Graph inspection, the parent's side: one child for all loads, there only while it is needed."""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

_COMMAND = (sys.executable, "-P", "-m", "thirdrail_engines.inspect_graphs")
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Findings:
    """positional_inputs: see positions.py. unranked: tensors whose shape the file leaves out.
    sized_by_shapes: see amounts.py.

    Empty findings are the safe ones: every input is then copied before a run.
    """

    positional_inputs: frozenset[str] = frozenset()
    unranked: frozenset[str] = frozenset()
    sized_by_shapes: bool = False
    error: str = ""  # why they are empty


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    # In the order of asking, which is the order of answers.
    waiting: deque[tuple[Path, Future[Findings]]] = field(default_factory=deque)
    since_ns: int = 0  # when it began to work on the first of them, or to be idle


class Inspector:
    """Reads graphs in a child process. Safe to use from several threads."""

    def __init__(self, *, timeout_s: float = 20.0, idle_s: float = 2.0) -> None:
        """timeout_s: the longest that one answer may take. idle_s: when the child is sent home."""
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._threads: set[threading.Thread] = set()

    def begin(self, path: Path) -> Future[Findings]:
        """Ask about one file. The future never fails: what cannot be read has empty findings."""
        future: Future[Findings] = Future()
        self._ask(path, future)
        return future

    def close(self) -> None:
        """Let the child finish what was asked, then end it."""
        while (
            True
        ):  # ends: every child answers or is killed, and none is started after the last question
            with self._lock:
                self._retire()
                thread = next(iter(self._threads), None)
            if thread is None:
                return
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, path: Path, future: Future[Findings]) -> None:
        with self._lock:
            child = self._child or self._start()
            if not child.waiting:
                child.since_ns = time.monotonic_ns()
            child.waiting.append((path, future))
            assert child.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it just died: its reader settles the rest
                child.process.stdin.write(json.dumps({"path": str(path)}).encode() + b"\n")

    def _start(self) -> _Child:
        process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        child = self._child = _Child(process)
        thread = threading.Thread(
            target=self._serve, args=(child,), name="graph-inspector", daemon=True
        )
        self._threads.add(thread)
        thread.start()
        return child

    def _retire(self) -> None:
        """Under the lock: end the child's input. It answers what it was asked and exits."""
        if self._child is not None:
            assert self._child.process.stdin is not None
            self._child.process.stdin.close()
            self._child = None

    def _serve(self, child: _Child) -> None:
        """One thread for each child: settle its answers, send it home, bury it."""
        try:
            self._listen(child)
        finally:
            self._bury(child)

    def _listen(self, child: _Child) -> None:
        assert child.process.stdout is not None
        buffer = b""
        with child.process.stdout as stdout:
            while True:  # ends with the child: it answers and is sent home, or is killed
                if not select.select([stdout], [], [], self._patience_s(child))[0]:
                    continue
                data = os.read(stdout.fileno(), _READ_BYTES)
                if not data:
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    self._settle(child, line)

    def _patience_s(self, child: _Child) -> float:
        """How long to wait now. A child whose time is up is killed if busy, sent home if idle."""
        with self._lock:
            limit_s = self._timeout_s if child.waiting else self._idle_s
            left_s = limit_s - (time.monotonic_ns() - child.since_ns) / 1e9
            if left_s > 0:
                return left_s
            if child.waiting:
                child.process.kill()
            elif self._child is child:
                self._retire()
            return limit_s

    def _settle(self, child: _Child, line: bytes) -> None:
        answer = json.loads(line)
        with self._lock:
            _, future = child.waiting.popleft()
            child.since_ns = time.monotonic_ns()
        future.set_result(
            Findings(
                frozenset(answer.get("positional_inputs", ())),
                frozenset(answer.get("unranked", ())),
                answer.get("sized_by_shapes", False),
                answer.get("error", ""),
            )
        )

    def _bury(self, child: _Child) -> None:
        """The child ended or makes no sense: settle what it left, ask another about the rest."""
        with self._lock:
            if self._child is child:
                self._retire()
        child.process.kill()
        status = child.process.wait()
        left = list(child.waiting)  # nobody adds to it any more
        for _, future in left[:1]:  # it was at work on this one
            future.set_result(Findings(error=f"the inspecting process ended with {status}"))
        for path, future in left[1:]:
            self._ask(path, future)
        with self._lock:
            self._threads.discard(threading.current_thread())
