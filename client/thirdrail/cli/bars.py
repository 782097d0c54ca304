# SPDX-License-Identifier: Apache-2.0
"""Progress on a terminal's standard error: a line per piece of work, with its phase and a clock.

Builders have dozens of phases, some within others, and nobody knows beforehand how many. So the bar
shows how far the present phase is; where that is unknown, it only shows life.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from thirdrail.cli.session import console
from thirdrail.models import LoadProgress, OnProgress


class PhaseBar:
    """The line of one piece of work."""

    def __init__(self, bars: Progress, name: str) -> None:
        self._bars = bars
        number = bars.add_task("", name=escape(name), total=None)
        self._task = next(task for task in bars.tasks if task.id == number)

    def show(self, phase: str, step: int = 0, steps: int = 0) -> None:
        """step, steps: within the phase; 0 steps: nobody knows."""
        # Progress.update cannot forget a total, and stops the clock where it is reached.
        task = self._task
        task.description, task.completed, task.total = escape(phase), step, steps or None

    def end(self, word: str, *, failed: bool = False) -> None:
        """The work is over: the clock stops."""
        color = "red" if failed else "green"
        self._task.total = None
        self._bars.update(self._task.id, description=f"[{color}]{word}[/]", total=1, completed=1)


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
def load_bar(model: str) -> Iterator[OnProgress]:
    """What shows a load's progress."""
    with progress_on(console(stderr=True)) as bars:
        bar = PhaseBar(bars, model)

        def show(at: LoadProgress) -> None:
            bar.show(at.phase, at.phase_step, at.phase_steps)

        try:
            yield show
        except BaseException:
            bar.end("failed", failed=True)
            raise
        bar.end("ready")
