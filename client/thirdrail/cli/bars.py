# SPDX-License-Identifier: Apache-2.0
"""Progress on a terminal's standard error: one bar per phase, and the time that each took."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from thirdrail.cli.session import console
from thirdrail.models import LoadProgress, OnProgress

PHASES_MAX = 40  # of one load, on the screen; those before the last ones scroll off


class PhaseBars:
    """The bars of one piece of work. A phase that is told anew under another name ends the last."""

    def __init__(self, bars: Progress, name: str) -> None:
        self._bars = bars
        self._name = name
        self._phase = ""
        self._bar: TaskID | None = None

    def show(self, phase: str, step: int = 0, steps: int = 0) -> None:
        """step, steps: within the phase; 0 steps: nobody knows, so the bar only shows life."""
        if phase != self._phase or self._bar is None:
            self.end()
            self._phase = phase
            self._bar = self._bars.add_task(escape(phase), name=escape(self._name), total=None)
            self._drop_old()
        self._bars.update(self._bar, completed=step, total=steps or None)

    def end(self, *, failed: bool = False) -> None:
        """The last phase is over: its clock stops."""
        if self._bar is None:
            return
        if failed:
            self._bars.update(self._bar, description=f"[red]{escape(self._phase)} failed[/]")
            self._bars.stop_task(self._bar)
        else:
            self._bars.update(self._bar, total=1, completed=1)
        self._bar = None

    def _drop_old(self) -> None:
        for task in self._bars.tasks[:-PHASES_MAX]:
            self._bars.remove_task(task.id)


def progress_on(err: Console) -> Progress:
    """Bars on a terminal; nothing where there is none."""
    columns = (
        TextColumn("{task.fields[name]}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=err, disable=not err.is_terminal)


@contextmanager
def load_bars(model: str) -> Iterator[OnProgress]:
    """What shows a load's progress."""
    with progress_on(console(stderr=True)) as bars:
        phases = PhaseBars(bars, model)

        def show(at: LoadProgress) -> None:
            if at.phase != "ready":
                phases.show(at.phase, at.phase_step, at.phase_steps)

        try:
            yield show
        except BaseException:
            phases.end(failed=True)
            raise
        phases.end()
