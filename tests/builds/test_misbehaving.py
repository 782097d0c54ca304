# SPDX-License-Identifier: Apache-2.0
"""Whatever a build's process does becomes a BuildError that says what happened, and no more."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from thirdrail_engines.builds import BuildLimits, BuiltPlan, run_build
from thirdrail_engines.plans import (
    Builder,
    BuildError,
    BuildFault,
    PlanRequest,
    Profile,
    ShapeRange,
)

MIB = 1 << 20
Misbehave = Callable[..., BuiltPlan]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (
            "segfault",
            "the process of the onnxruntime build was ended by SIGSEGV without a result; "
            "its last words: about to read address 0",
        ),
        (
            "abort",
            "the process of the onnxruntime build was ended by SIGABRT without a result; its last "
            "words: first line | terminate called after throwing an instance of 'std::bad_cast'",
        ),
        ("exit_code", "the process of the onnxruntime build ended with exit code 7 without a"),
        ("exit_after_result", "the process of the onnxruntime build ended with exit code 7"),
        ("killed", "the process of the onnxruntime build was ended by SIGKILL without a result"),
        ("nothing", "the process of the onnxruntime build ended with exit code 0 without a"),
        ("garbage", "the process of the onnxruntime build made no sense: it sent "),
        ("huge_line", "made no sense: it sent more than a build has to say"),
        ("deep", "made no sense: it sent a line nested too deeply"),
        ("progress_for_ever", "made no sense: it sent more progress than there can be"),
        ("two_results", "made no sense: it sent a second result"),
        ("plan_elsewhere", "made no sense: it sent a plan with the name '../model.plan'"),
        ("plan_is_a_link", "the build left a plan that is no file, or empty"),
        ("plan_is_absent", "the build left no plan: No such file or directory"),
    ],
)
def test_a_crash_is_an_error(misbehave: Misbehave, what: str, text: str) -> None:
    with pytest.raises(BuildError) as caught:
        misbehave(what)
    assert caught.value.fault is BuildFault.CRASHED
    assert text in str(caught.value)


def test_progress_takes_no_room_of_the_result(misbehave: Misbehave) -> None:
    told: list[str] = []
    built = misbehave("much_progress", tell=lambda phase, *_steps: told.append(phase))
    assert built.plan.read_bytes() == b"plan"
    assert len(told) > 17_000


def test_a_refusal_is_presentable(misbehave: Misbehave) -> None:
    with pytest.raises(BuildError) as caught:
        misbehave("escape_codes")
    assert caught.value.fault is BuildFault.REFUSED
    assert str(caught.value) == "no [2Jthing forged line"


@pytest.mark.parametrize("what", ["hang", "hang_deaf"])
def test_a_build_that_takes_too_long_is_ended(misbehave: Misbehave, what: str) -> None:
    """It would take 600 s."""
    said = out_of_time(misbehave, what, 0.5)
    if what == "hang" and "still at it" not in said:  # a busy host had it wait for its turn
        said = out_of_time(misbehave, what, 20)
    assert ("still at it" in said) == (what == "hang")


def test_a_build_that_never_reads_what_to_do_is_ended(source: Path, folder: Path) -> None:
    """However much that is: more than a pipe holds."""
    shapes = ShapeRange((1, 3, 32, 32), (4, 3, 64, 64), (8, 3, 128, 128))
    profile = Profile({f"input_{number}": shapes for number in range(2000)})
    request = PlanRequest(source, Builder.ONNXRUNTIME, "", profiles=(profile,))
    limits = BuildLimits(seconds_max=0.1)
    with pytest.raises(BuildError, match="took longer than"):
        run_build(
            request, folder, limits, lambda *_: None, threading.Event(), command=["sleep", "600"]
        )


def test_a_build_whose_folder_is_gone_is_an_error(misbehave: Misbehave, folder: Path) -> None:
    folder.rmdir()
    with pytest.raises(BuildError, match="cannot make a folder in") as caught:
        misbehave("well")
    assert caught.value.fault is BuildFault.OUT_OF_DISK


def out_of_time(misbehave: Misbehave, what: str, seconds: float) -> str:
    with pytest.raises(BuildError) as caught:
        misbehave(what, BuildLimits(seconds_max=seconds))
    assert caught.value.fault is BuildFault.OUT_OF_TIME
    assert f"the onnxruntime build took longer than {seconds:g} s" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("what", ["hog", "hog_in_children"])
def test_a_build_that_takes_too_much_memory_is_ended(
    misbehave: Misbehave, folder: Path, what: str
) -> None:
    with pytest.raises(BuildError) as caught:
        misbehave(what, BuildLimits(seconds_max=60, memory_bytes_max=300 * MIB))
    assert caught.value.fault is BuildFault.OUT_OF_MEMORY
    assert "may take 300 MiB" in str(caught.value)
    for file in folder.glob("hog*"):
        assert_gone(int(file.name.removeprefix("hog")))


def test_much_output_is_read_and_not_kept(misbehave: Misbehave) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    assert misbehave("flood").plan.read_bytes() == b"plan"
    assert peak_bytes() - before < 10 * MIB


def test_what_a_build_leaves_running_is_ended_with_it(misbehave: Misbehave) -> None:
    """Else the build would go on until it is out of time."""
    conversion = misbehave("leaves_a_child").conversion
    assert conversion is not None
    child = conversion["child"]
    assert isinstance(child, int)
    assert_gone(child)


def test_an_error_of_who_listens_ends_the_build(misbehave: Misbehave) -> None:
    def tell(phase: str, done: int, steps: int) -> None:
        if done:
            raise KeyError(phase)

    with pytest.raises(KeyError, match="at work"):
        misbehave("progress_for_ever", tell=tell)


def test_a_process_that_cannot_be_started_is_an_error(misbehave: Misbehave, folder: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)  # the limit is one of numbers, and those in use may have gaps
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(BuildError, match="no process could be started"):
            misbehave("well")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def assert_gone(pid: int) -> None:
    deadline_s = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
