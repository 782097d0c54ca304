# SPDX-License-Identifier: Apache-2.0
"""The bars of loads and builds, on a terminal that is text."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from thirdrail.cli.bars import PhaseBar, progress_on


def on_terminal() -> tuple[Progress, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, color_system=None)
    return progress_on(console), text


def test_the_phase_is_shown_and_how_the_work_ended() -> None:
    bars, text = on_terminal()
    with bars:
        bar = PhaseBar(bars, "m [1]")
        bar.show("optimising", 1, 4)
        bars.refresh()
        assert bars.tasks[0].percentage == pytest.approx(25)
        bar.show("writing [plan]")
        assert (bars.tasks[0].total, bars.tasks[0].finished) == (None, False)
        bars.refresh()
        bar.end("2 built, 1 failed", failed=True)
    shown = text.getvalue()
    assert "m [1]" in shown
    assert (
        shown.index("optimising") < shown.index("writing [plan]") < shown.index("2 built, 1 failed")
    )
    assert bars.tasks[0].finished


def test_a_phase_that_is_done_does_not_stop_the_clock() -> None:
    bars, _ = on_terminal()
    with bars:
        bar = PhaseBar(bars, "m")
        bar.show("one", 3, 3)
        bar.show("two", 3, 3)
        assert not bars.tasks[0].finished


def test_without_a_terminal_nothing_is_shown() -> None:
    text = io.StringIO()
    with progress_on(Console(file=text)) as bars:
        PhaseBar(bars, "m").show("optimising", 1, 4)
    assert text.getvalue() == ""
