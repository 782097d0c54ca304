# SPDX-License-Identifier: Apache-2.0
"""The child that reads graphs: shared, survivable, gone when idle."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from onnx import TensorProto, helper

from thirdrail_engines import Inspector

WAIT_S = 30.0


@pytest.fixture
def model(write_model: Callable[..., Path]) -> Path:
    value = (TensorProto.FLOAT, ["n"])
    node = helper.make_node("Neg", ["x"], ["y"])
    return write_model([node], {"x": value}, {"y": (TensorProto.FLOAT, None)})


@pytest.fixture
def waits_for_ever(tmp_path: Path) -> Path:
    """A path whose reader never gets anything, not even its end."""
    path = tmp_path / "pipe.onnx"
    os.mkfifo(path)
    return path


def test_many_askers_share_one_child(model: Path) -> None:
    before = children()
    with Inspector() as inspector:
        futures = [inspector.begin(model) for _ in range(20)]
        assert len(children() - before) == 1
        for future in futures:
            findings = future.result(WAIT_S)
            assert findings.positional_inputs == {"x"}
            assert findings.unranked == {"y"}
            assert findings.sized_by_shapes
            assert findings.error == ""
    assert children() <= before


def test_an_idle_child_goes_home_and_another_comes(model: Path) -> None:
    before = children()
    with Inspector(idle_s=0.01) as inspector:
        for _ in range(2):
            assert inspector.begin(model).result(WAIT_S).positional_inputs == {"x"}
            deadline = time.monotonic() + WAIT_S
            while not children() <= before:
                assert time.monotonic() < deadline, "the child stayed"
                time.sleep(0.01)


def test_what_cannot_be_read_has_empty_findings(tmp_path: Path, model: Path) -> None:
    bad = tmp_path / "bad\nname.onnx"
    bad.write_bytes(b"nonsense")
    with Inspector() as inspector:
        futures = [inspector.begin(path) for path in (bad, tmp_path / "absent.onnx", model)]
        for future in futures[:2]:
            findings = future.result(WAIT_S)
            assert findings.error
            assert not findings.positional_inputs
        assert futures[2].result(WAIT_S).positional_inputs == {"x"}


@pytest.mark.slow
def test_a_child_that_takes_too_long_is_killed_and_the_next_in_line_served(
    model: Path, waits_for_ever: Path
) -> None:
    before = children()
    with Inspector(timeout_s=8.0) as inspector:
        stuck, others = inspector.begin(waits_for_ever), [inspector.begin(model) for _ in range(3)]
        assert stuck.result(WAIT_S).error == "the inspecting process ended with -9"
        for other in others:
            assert other.result(WAIT_S).positional_inputs == {"x"}
    assert children() <= before


def test_a_child_that_is_killed_is_replaced(model: Path, waits_for_ever: Path) -> None:
    before = children()
    with Inspector() as inspector:
        first, second = inspector.begin(waits_for_ever), inspector.begin(model)
        for pid in children() - before:
            psutil.Process(pid).kill()
        assert first.result(WAIT_S).error
        assert second.result(WAIT_S).positional_inputs == {"x"}


def test_closing_waits_for_answers_and_leaves_no_thread(model: Path) -> None:
    before = threading.enumerate()  # with those of other inspectors
    inspector = Inspector()
    future = inspector.begin(model)
    inspector.close()
    assert future.done()
    assert future.result().positional_inputs == {"x"}
    left = [thread for thread in threading.enumerate() if thread not in before]
    assert "graph-inspector" not in {thread.name for thread in left}


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}
