# SPDX-License-Identifier: Apache-2.0
"""What TensorRT calls while it works: a logger and a progress monitor.

Both are called from any of its threads. An exception that leaves them would be printed and dropped.
"""

from dataclasses import dataclass, field

from thirdrail_engines.plans import TellProgress
from thirdrail_engines.tensorrt import native as t

_MESSAGES_MAX = 100  # of each kind; the first ones tell the cause
_MESSAGE_CHARS_MAX = 4000


@dataclass(slots=True)
class Messages:
    """What was logged as an error or as a warning. The rest tells of TensorRT's own work."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, severity: str, text: str) -> None:
        if severity == "WARNING":
            kept = self.warnings
        elif severity in ("ERROR", "INTERNAL_ERROR"):
            kept = self.errors
        else:
            return
        if len(kept) < _MESSAGES_MAX:
            kept.append(text[:_MESSAGE_CHARS_MAX])


class Phases:
    """Passes the builder's phases and steps on to `tell`.

    An exception of `tell` asks the builder to stop; it is then in `stopped_by`.
    """

    def __init__(self, tell: TellProgress) -> None:
        self._tell = tell
        self._steps: dict[str, int] = {}
        self.stopped_by: BaseException | None = None

    def start(self, phase: str, steps: int) -> None:
        self._steps[phase] = steps
        self._try_to_tell(phase, 0, steps)

    def step(self, phase: str, index: int) -> bool:
        """index: of the step that is done, from 0. Returns whether to go on."""
        steps = self._steps.get(phase, 0)
        self._try_to_tell(phase, min(index + 1, steps), steps)
        return self.stopped_by is None

    def _try_to_tell(self, phase: str, done: int, steps: int) -> None:
        if self.stopped_by is not None:
            return
        try:
            self._tell(phase, done, steps)
        except BaseException as error:
            self.stopped_by = error


def make_logger(trt: t.Module, messages: Messages) -> t.ILogger:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: t.Severity, text: str) -> None:
            messages.add(severity.name, text)

    return Logger()


def make_monitor(trt: t.Module, phases: Phases) -> t.IProgressMonitor:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            phases.start(phase, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            return phases.step(phase, step)

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()
