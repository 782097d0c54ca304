# SPDX-License-Identifier: Apache-2.0
"""A build, or the run of a reference, seen from the process that wants it: start it, watch it, hear
it, bury it.

One thread does it all in turns of at most _TURN_S: read what came, then see whether the build is
cancelled, late or too large. The process is never waited for without a bound, and whatever ends
this function ends the process and all that it started.
"""

import logging
import os
import selectors
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from thirdrail_engines.builds import memory_group, process_tree, wire
from thirdrail_engines.builds.deaths import describe_end, kernel_oom_kills, last_words
from thirdrail_engines.builds.environment import build_environment
from thirdrail_engines.builds.limits import BuildLimits
from thirdrail_engines.builds.result import BuiltPlan
from thirdrail_engines.builds.turns import cancelled_error, turn
from thirdrail_engines.expectations import ReferenceRequest
from thirdrail_engines.plans import BuildError, BuildFault, PlanRequest, TellProgress

_log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("child.py")))
_TURN_S = 0.05  # how long a cancel may go unnoticed
_END_S_MAX = 5.0  # for a killed process to be gone
_READ_BYTES = 1 << 16
# What a build tells of its progress: so much at any time, and more the longer it takes.
_PROGRESS_LINES_MAX = 20_000
_PROGRESS_LINES_PER_S_MAX = 1000
_OUTPUT_BYTES_KEPT = 16 << 10
_MIB = 1 << 20


def run_build(
    request: PlanRequest,
    folder: Path,
    limits: BuildLimits,
    tell: TellProgress,
    cancelled: threading.Event,
    *,
    command: Sequence[str] = _COMMAND,
) -> BuiltPlan:
    """Build a plan in a process of its own. Takes as long as that does, and holds this thread.

    folder: private, and empty but for the timings that a build may begin with; what is left in it
        besides those and the plan is of no use.
    tell: called from this thread.
    command: what to run; the number of this process and the niceness are put behind it.

    Raises BuildError, at the latest a fifth of a second after `cancelled` is set.
    """
    with turn(limits.builds_at_once_max, tell, cancelled):
        tell("starting the build", 0, 0)
        build = _Build(f"{request.builder} build", limits, tell, cancelled)
        return build.run(command, request, folder)


def run_reference(
    request: ReferenceRequest,
    folder: Path,
    limits: BuildLimits,
    cancelled: threading.Event,
    *,
    command: Sequence[str] = _COMMAND,
) -> BuiltPlan:
    """Compute what a reference expects, under the same limits as a build, which it does not wait
    for. The "plan" of the result is the file that `read_expectations` reads.

    folder: private; a plan of the request may lie in it. Raises BuildError, as `run_build` does.
    """
    return _Build("reference run", limits, _tell_nobody, cancelled).run(command, request, folder)


def _tell_nobody(phase: str, done: int, steps: int) -> None:
    pass


class _Build:
    def __init__(
        self, what: str, limits: BuildLimits, tell: TellProgress, cancelled: threading.Event
    ) -> None:
        self._what = what  # in words for errors
        self._limits = limits
        self._tell = tell
        self._cancelled = cancelled
        self._unread = b""  # the start of an answer's line
        self._progress_lines = 0
        self._began_s = time.monotonic()
        self._output = b""  # the end of all that it printed
        self._result: wire.Result | None = None
        self._peak_bytes = 0

    def run(
        self, command: Sequence[str], request: PlanRequest | ReferenceRequest, folder: Path
    ) -> BuiltPlan:
        kills_before = kernel_oom_kills()
        order = wire.write_order(wire.Order(request, folder.absolute()))
        process = _start([*command, str(os.getpid()), str(self._limits.niceness)], folder, order)
        with memory_group.of(process.pid, self._limits.memory_bytes_max) as group:
            try:
                self._attend(process, self._began_s + self._limits.seconds_max)
                was_kernel = group.was_exceeded() or kernel_oom_kills() > kills_before
            finally:
                _end(process)  # before its group, which goes when it is empty
        self._check_end(process.returncode, was_kernel)
        assert self._result is not None
        return BuiltPlan(
            _checked_plan(folder, self._result.plan_name),
            self._result.layers,
            self._result.source_layers,
            self._result.tensors,
            self._result.conversion,
            self._result.warnings,
            time.monotonic() - self._began_s,
            self._peak_bytes,
        )

    def _attend(self, process: subprocess.Popen[bytes], until_s: float) -> None:
        """Until the process has ended and all that it said was heard."""
        assert process.stdout is not None
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, self._hear)
            selector.register(process.stderr, selectors.EVENT_READ, self._keep)
            looked_s = 0.0
            while True:  # ends: with the process, or by an error at the time limit
                has_ended = _has_ended(process.pid)
                if has_ended:
                    process_tree.kill(process.pid)  # what it left behind has nothing to add
                heard = self._read(selector, 0.0 if has_ended else _TURN_S)
                if has_ended and not heard:  # others may hold its pipes open for ever
                    return
                now_s = time.monotonic()
                if now_s >= looked_s + _TURN_S:
                    self._check_limits(process.pid, now_s >= until_s)
                    looked_s = now_s

    def _read(self, selector: selectors.BaseSelector, wait_s: float) -> bool:
        """Whether anything came."""
        if not selector.get_map():
            time.sleep(wait_s)
            return False
        came = False
        for key, _ in selector.select(wait_s):
            data = os.read(key.fd, _READ_BYTES)
            if data:
                key.data(data)
                came = True
            else:
                selector.unregister(key.fileobj)
        return came

    def _check_limits(self, pid: int, is_late: bool) -> None:
        if self._cancelled.is_set():
            raise cancelled_error()
        if is_late:
            raise BuildError(
                BuildFault.OUT_OF_TIME,
                f"the {self._what} took longer than {self._limits.seconds_max:g} s"
                f"{last_words(self._output)}",
            )
        held_bytes = process_tree.memory_bytes(pid)
        self._peak_bytes = max(self._peak_bytes, held_bytes)
        if 0 < self._limits.memory_bytes_max < held_bytes:
            raise self._too_large(f"took {held_bytes // _MIB} MiB")

    def _too_large(self, what: str) -> BuildError:
        return BuildError(
            BuildFault.OUT_OF_MEMORY,
            f"the {self._what} {what} of memory, and may take "
            f"{self._limits.memory_bytes_max // _MIB} MiB{last_words(self._output)}",
        )

    def _keep(self, data: bytes) -> None:
        self._output = (self._output + data)[-_OUTPUT_BYTES_KEPT:]

    def _hear(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        if len(self._unread) > wire.LINE_BYTES_MAX:
            raise self._nonsense("more than a build has to say")
        for line in lines:
            try:
                answer = wire.read_answer(line)
            except ValueError as error:
                raise self._nonsense(str(error)) from None
            self._heed(answer)

    def _heed(self, answer: wire.Answer) -> None:
        match answer:
            case wire.Progress():
                self._count_progress()
                self._tell(answer.phase, answer.done, answer.steps)
            case wire.Refusal():
                raise BuildError(answer.fault, answer.text)
            case wire.Result():
                if self._result is not None:
                    raise self._nonsense("a second result")
                self._result = answer

    def _count_progress(self) -> None:
        self._progress_lines += 1
        elapsed_s = time.monotonic() - self._began_s
        if self._progress_lines > _PROGRESS_LINES_MAX + elapsed_s * _PROGRESS_LINES_PER_S_MAX:
            raise self._nonsense("more progress than there can be")

    def _nonsense(self, what: str) -> BuildError:
        return BuildError(
            BuildFault.CRASHED,
            f"the process of the {self._what} made no sense: it sent {what}"
            f"{last_words(self._output)}",
        )

    def _check_end(self, status: int, was_kernel: bool) -> None:
        if status == 0 and self._result is not None:
            return
        if status == -9 and was_kernel:
            raise BuildError(
                BuildFault.OUT_OF_MEMORY,
                f"the system ended the {self._what} because memory ran out; "
                f"it was last seen with {self._peak_bytes // _MIB} MiB",
            )
        raise BuildError(
            BuildFault.CRASHED,
            f"the process of the {self._what} {describe_end(status)} "
            f"without a result{last_words(self._output)}",
        )


def _start(command: Sequence[str], folder: Path, order: bytes) -> subprocess.Popen[bytes]:
    """order: what it reads. Written already, since a pipe holds less, and whoever fills one waits
    for as long as nobody reads."""
    home = _home_in(folder)
    try:
        with open(os.memfd_create("order"), "w+b", buffering=0) as stdin:
            stdin.write(order)
            stdin.seek(0)
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=folder,
                env=build_environment(os.environ, sys.path, home),
                start_new_session=True,  # the terminal's Ctrl-C is not for it
            )
    except OSError as error:  # no memory, or too many processes
        raise BuildError(
            BuildFault.CRASHED, f"no process could be started to build in: {error.strerror}"
        ) from None


def _home_in(folder: Path) -> Path:
    home = folder / "home"
    try:
        home.mkdir(mode=0o700)
    except OSError as error:  # of a disk that is full, or gone by now
        raise BuildError(
            BuildFault.OUT_OF_DISK, f"cannot make a folder in {folder}: {error.strerror}"
        ) from None
    return home


def _has_ended(pid: int) -> bool:
    """Without burying it: so long, no other process can get its number."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever happened: nothing of it is left."""
    process_tree.kill(process.pid)
    try:
        process.wait(_END_S_MAX)
    except subprocess.TimeoutExpired:  # in a driver's call that nothing interrupts
        _log.warning("process %d of a build was killed and does not end", process.pid)
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def _checked_plan(folder: Path, name: str) -> Path:
    path = folder / name
    try:
        status = path.lstat()
    except OSError as error:
        raise BuildError(BuildFault.CRASHED, f"the build left no plan: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        raise BuildError(BuildFault.CRASHED, "the build left a plan that is no file, or empty")
    return path
