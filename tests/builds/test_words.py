# SPDX-License-Identifier: Apache-2.0
"""What the two processes of a build say to each other, and what is made of it."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thirdrail_engines.builds import BuildLimits, PlanTensor, memory_group
from thirdrail_engines.builds.deaths import describe_end, last_words
from thirdrail_engines.builds.stages import Throttle
from thirdrail_engines.builds.wire import (
    Order,
    Progress,
    Refusal,
    Result,
    presentable,
    read_answer,
    read_order,
    write_answer,
    write_order,
)
from thirdrail_engines.cpu_target import _flags, cpu_target
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.expectations import ProofLimits, ReferenceRequest
from thirdrail_engines.inspector import Findings
from thirdrail_engines.onnxruntime_plan import read_plan, write_plan
from thirdrail_engines.plans import (
    Builder,
    BuildFault,
    PlanRequest,
    Precision,
    Profile,
    ShapeRange,
)
from thirdrail_engines.trials import ValueRange

RESULT = Result(
    "model.plan",
    {"Conv": 3},
    {"Conv": 3, "Relu": 3},
    (PlanTensor("x", "FP32", (-1, 3), is_input=True),),
    {"kept": ["a"], "share": 0.5},
    ("careful",),
)
ANSWERS = (Progress("parsing", 1, 2), Refusal(BuildFault.REFUSED, "no"), RESULT)


def test_an_order_arrives_whole() -> None:
    request = PlanRequest(
        source=Path("/models/é.onnx"),
        builder=Builder.TENSORRT_RTX,
        builder_version="1.7.1",
        precision=Precision.FP16,
        profiles=(Profile({"x": ShapeRange((1, 3), (4, 3), (8, 3))}), Profile({})),
        compute_capabilities=("sm86", "sm120"),
        target="GPU-1",
        rules="positions 7",
        workspace_bytes=1 << 30,
        optimization_level=3,
        is_version_compatible=True,
        is_refittable=True,
        plugins=(Path("/lib/plugin.so"),),
        uses_timing_cache=False,
        threads_max=3,
    )
    order = Order(request, Path("/cache/build"))
    arrived = read_order(write_order(order))
    assert arrived == order
    assert isinstance(arrived.request, PlanRequest)
    assert not arrived.request.uses_timing_cache  # not compared
    assert arrived.request.threads_max == 3


def test_an_order_for_a_reference_arrives_whole() -> None:
    order = Order(
        ReferenceRequest(
            source=Path("/models/é.pt2"),
            plan=Path("/cache/reference.plan"),
            profiles=(Profile({"x": ShapeRange((1, 3), (4, 3), (8, 3))}),),
            values={"x": ValueRange(-0.5, 7)},
            limits=ProofLimits(bytes_max=1, seconds_max=2.5, kept_bytes_max=3),
            threads_max=3,
            times=4,
        ),
        Path("/cache/proof"),
    )
    assert read_order(write_order(order)) == order


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_an_answer_arrives_whole(answer: Any) -> None:
    assert read_answer(write_answer(answer)) == answer


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.sampled_from(ANSWERS), st.data())
def test_an_answer_with_anything_else_in_it_is_refused_or_valid(answer: Any, data: Any) -> None:
    """Some part is replaced by some value: it is a ValueError, or an answer that can be written."""
    message = json.loads(write_answer(answer))
    place, key = data.draw(st.sampled_from(list(places(message))))
    place[key] = data.draw(JSON)
    try:
        came = read_answer(json.dumps(message).encode())
    except ValueError:
        return
    assert read_answer(write_answer(came)) == came


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_answer(line)


@pytest.mark.parametrize(
    "change",
    [
        {"plan": ""},
        {"plan": ".."},
        {"plan": "a/b"},
        {"plan": "a" * 256},
        {"layers": {"Conv": -1}},
        {"layers": {"Conv": True}},
        {"layers": {"C" * 2000: 1}},
        {"layers": {str(number): 1 for number in range(10_001)}},
        {"tensors": [["x", "FP32", [-2], True]]},
        {"tensors": [["x", "FP32", [1 << 63], True]]},
        {"tensors": [["x", "FP32", [1] * 65, True]]},
        {"tensors": [["x", "FP32", [1], 1]]},
        {"tensors": [["x", "FP32", [1]]]},
        {"warnings": ["x" * 4001]},
        {"warnings": "text"},
        {"conversion": []},
        {"conversion": {"text": "x" * 300_000}},
        {"more": 1},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_result_beyond_its_bounds_is_refused(change: dict[str, Any]) -> None:
    message = json.loads(write_answer(RESULT))
    message["result"].update(change)
    with pytest.raises(ValueError, match=r"none|no |name|other fields|longer"):
        read_answer(json.dumps(message).encode())


def test_a_number_too_long_to_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="digits"):
        read_answer(b'{"progress": ["x", 1, ' + b"9" * 5000 + b"]}")


def places(value: Any) -> Any:
    """Every container within, with every key or index of it."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def test_text_is_made_presentable() -> None:
    assert presentable("a\x1b[31mb\nc\u202ed\x00") == "a [31mb c d"


def test_ends_are_told_by_name() -> None:
    assert describe_end(3) == "ended with exit code 3"
    assert describe_end(-11) == "was ended by SIGSEGV"
    assert describe_end(-250) == "was ended by signal 250"


def test_last_words_are_few() -> None:
    assert last_words(b" \n\n") == ""
    assert last_words(b"1\n2\n\n3\n4\n5\n\xff6\n") == "; its last words: 2 | 3 | 4 | 5 | \ufffd6"
    assert len(last_words(b"x" * 5000)) < 1100


def test_progress_is_told_at_a_bearable_rate() -> None:
    said: list[Progress] = []
    throttle = Throttle(said.append)
    began_s = time.monotonic()

    def tell_often() -> None:
        for step in range(10_000):
            throttle.tell("tactics", step, 10_001)

    threads = [threading.Thread(target=tell_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    throttle.tell("tactics", 10_001, 10_001)
    throttle.tell("x" * 500, -1, 0)
    assert len(said) < 4 + (time.monotonic() - began_s) / 0.05
    assert said[-2] == Progress("tactics", 10_001, 10_001)
    assert said[-1] == Progress("x" * 100, 0, 0)


@pytest.mark.parametrize(
    "limits",
    [
        {"seconds_max": 0},
        {"seconds_max": float("nan")},
        {"memory_bytes_max": -1},
        {"niceness": 20},
        {"niceness": -1},
        {"builds_at_once_max": 0},
    ],
    ids=str,
)
def test_limits_that_are_none_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        BuildLimits(**limits)


def test_a_memory_group_tells_whether_the_kernel_killed_in_it(tmp_path: Path) -> None:
    """On plain files: few test machines have a group to give away."""
    group = memory_group.MemoryGroup(tmp_path)
    assert not group.was_exceeded()
    events = tmp_path / "memory.events"
    events.write_text("low 0\nhigh 0\nmax 31\noom 1\noom_kill 0\noom_group_kill 0\n")
    assert not group.was_exceeded()
    events.write_text("low 0\nhigh 0\nmax 31\noom 1\noom_kill 1\noom_group_kill 1\n")
    assert group.was_exceeded()
    assert not memory_group.MemoryGroup(None).was_exceeded()


def test_a_memory_group_is_entered_only_where_the_kernel_offers_it(tmp_path: Path) -> None:
    assert not memory_group._enter(tmp_path, 7, 1000)
    assert not list(tmp_path.iterdir())
    for name in ("memory.max", "memory.oom.group", "cgroup.procs"):
        (tmp_path / name).touch()
    assert memory_group._enter(tmp_path, 7, 1000)
    assert [(tmp_path / name).read_text() for name in ("memory.max", "cgroup.procs")] == [
        "1000",
        "7",
    ]


def test_the_cpu_is_named_by_what_all_its_cores_have() -> None:
    cpuinfo = (
        "processor: 0\nflags\t\t: fpu avx avx2\n\nprocessor: 1\nflags : avx fpu\nvmx flags : x\n"
    )
    assert _flags(cpuinfo) == {"fpu", "avx"}
    assert _flags("Features\t: fp asimd\n") == {"fp", "asimd"}
    assert _flags("") == frozenset()
    assert cpu_target() == cpu_target()
    assert cpu_target().split()[0] in ("x86_64", "aarch64")


def test_a_plan_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    graph, weights, path = tmp_path / "graph", tmp_path / "weights", tmp_path / "plan"
    graph.write_bytes(b"graph")
    weights.write_bytes(b"weights")
    findings = Findings(frozenset({"x"}), frozenset({"y"}), sized_by_shapes=True)
    write_plan(path, graph, weights, findings)
    data = path.read_bytes()
    plan = read_plan("model.onnx", data)
    assert (plan.graph, bytes(plan.weights)) == (b"graph", b"weights")
    assert plan.findings == findings
    for length in range(len(data)):
        with pytest.raises(ModelFileError, match=r"^model.onnx: its plan "):
            read_plan("model.onnx", data[:length])
    with pytest.raises(ModelFileError):
        read_plan("model.onnx", data + b"x")
    for index in range(len(data) - len(b"graphweights")):  # what is behind has no form of ours
        for byte in (0, 0x39, 0xFF):
            changed = data[:index] + bytes([byte]) + data[index + 1 :]
            try:
                read_plan("model.onnx", changed)
            except ModelFileError:
                continue
