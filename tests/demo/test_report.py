# SPDX-License-Identifier: Apache-2.0
"""Tests of report.py and stopwatch.py: what a reader of the demo's tables sees."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from thirdrail.requests import Result
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.demo import report
from thirdrail_server.demo.jobs import Check, Outcome
from thirdrail_server.demo.stopwatch import Stopwatch

RIGHT = Check("a.css", "css", "css", "98%", is_ok=True)
WRONG = Check("b.sql", "sql", "[red]txt", "51%", is_ok=False)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def outcome(*checks: Check) -> Outcome:
    return Outcome("Which type?", "file", "score", checks)


def test_expected_and_got_stand_side_by_side(console: Console) -> None:
    report.print_outcome(console, outcome(RIGHT, WRONG))
    rows = [line.split() for line in text_of(console).splitlines()]
    assert ["a.css", "css", "css", "98%", "ok"] in rows
    assert ["b.sql", "sql", "[red]txt", "51%", "WRONG"] in rows  # an answer is never markup


def test_summary_counts_what_is_wrong(console: Console) -> None:
    report.print_summary(console, [outcome(RIGHT, WRONG), outcome(WRONG)], 1.0)
    assert "2 of 3 answers are not what was expected" in text_of(console)


def test_summary_of_a_good_run(console: Console) -> None:
    report.print_summary(console, [outcome(RIGHT), outcome(RIGHT)], 1.25)
    assert "All 2 answers are as expected" in text_of(console)


def test_commands_to_try_stay_whole_on_a_narrow_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=30)
    report.print_next_steps(console, tmp_path / "models")
    lines = text_of(console).splitlines()
    assert any(line.endswith(f"thirdrail serve {tmp_path / 'models'}") for line in lines)


def test_latencies_are_listed_by_model_and_kind(console: Console) -> None:
    rows = iter([1, 4, 0])

    def infer(model: str, inputs: object) -> Result:
        timing = pb.Timing(batch_rows=next(rows), transport="grpc")
        return Result(pb.InferResponse(model_name=model, timing=timing))

    stopwatch = Stopwatch(infer)
    stopwatch.infer("magika", {}, kind="one file")
    stopwatch.infer("magika", {}, kind="one file")
    stopwatch.infer("silero_vad", {}, kind="sound")
    batched, single = stopwatch.latencies()
    assert (batched.model, batched.kind, batched.calls) == ("magika", "one file", 2)
    assert batched.batch_rows_max == 4
    assert (single.model, single.calls, single.transport) == ("silero_vad", 1, "grpc")

    report.print_latencies(console, [batched, single])
    lines = text_of(console).splitlines()
    assert [line.split()[-1] for line in lines if "grpc" in line] == ["4", "-"]
