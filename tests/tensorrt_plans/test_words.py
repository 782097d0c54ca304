# SPDX-License-Identifier: Apache-2.0
"""Refusals and progress as pure code, with words that TensorRT has really said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thirdrail_engines.plans import BuildFault
from thirdrail_engines.tensorrt.callbacks import Messages, Phases
from thirdrail_engines.tensorrt.refusals import (
    Circumstances,
    ParserFault,
    builder_refusal,
    parser_refusal,
    tidy,
)

NO_DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient "
    "for CUDA runtime version))"
)
CANCELLED = (
    "IBuilder::buildSerializedNetwork: Error Code 7: BuildCanceled (Build canceled by user In next "
    "at /_src/optimizer/common/scopedProgressReporter.cpp:92)"
)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (?: Input dimensions "
            "with this name have different constant values. In getBounds at "
            "/_src/optimizer/common/shape/shapeContext.cpp:4433)",
            "Input dimensions with this name have different constant values",
        ),
        (
            "[graphScope.cpp::analyze::471] Error Code 2: Internal Error (Assertion "
            "tScope.getType() != ScopeType::kUNDEFINED failed.  In analyze at "
            "/_src/optimizer/common/graphScope.cpp:471)",
            "Assertion tScope.getType() != ScopeType::kUNDEFINED failed",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Input tensor input "
            "has static dimensions that don't match. In operator() at "
            "/_src/optimizer/api/network.cpp:4067)",
            "Input tensor input has static dimensions that don't match",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: "
            "check_turing_op_compatibility] Cannot compile operation 'a' for Turing (SM75): FP32 "
            "GEMM is not supported. In compileGraph at /_src/optimizer/codeGenerator.cpp:2012)",
            "Cannot compile operation 'a' for Turing (SM75): FP32 GEMM is not supported",
        ),
        (
            NO_DRIVER,
            "cudaError 35: CUDA driver version is insufficient for CUDA runtime version",
        ),
        ("WeightsContext.cpp:203: Failed to open file: w.bin", "Failed to open file: w.bin"),
        ("created with version \x01.\x07\n of it", "created with version . of it"),
        ("", ""),
    ],
)
def test_tidy(said: str, expected: str) -> None:
    assert tidy(said) == expected


@given(st.text(max_size=3000))
def test_tidy_is_short_and_on_one_line(said: str) -> None:
    text = tidy(said)
    assert len(text) <= 800
    assert not any(ord(char) < 32 for char in text)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (
            ParserFault("UNSUPPORTED_NODE", "false", "det", "Det"),
            "Det node 'det': unsupported node",
        ),
        (
            ParserFault("INVALID_NODE", 'creator && "Plugin not found?"', "n", "Nope"),
            "Nope node 'n': Plugin not found?",
        ),
        (
            ParserFault(
                "MODEL_DESERIALIZE_FAILED",
                "Assertion failed: model->ParseFromCodedStream(&codedInput): Failed to parse the "
                "ONNX model.",
            ),
            "Failed to parse the ONNX model",
        ),
    ],
)
def test_errors_of_the_parser(fault: ParserFault, expected: str) -> None:
    refusal = parser_refusal([fault], [])
    assert (refusal.fault, refusal.text) == (BuildFault.REFUSED, expected)


def test_a_silent_parser_and_builder() -> None:
    assert parser_refusal([], []).text == "the parser does not say why"
    assert builder_refusal([]).text == "the builder does not say why"


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (CANCELLED, BuildFault.CANCELLED),
        (NO_DRIVER, BuildFault.MISSING),
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Cuda Runtime (In generateForCurrent "
            "at /_src/runtime/core/cudaDeviceProfile.cpp:198)",  # as 1.4 says it
            BuildFault.MISSING,
        ),
        ("Error Code 1: Cuda Runtime (cudaError 700: an illegal access)", BuildFault.REFUSED),
        ("Error Code 2: OutOfMemory (Requested size was 123 bytes.)", BuildFault.OUT_OF_MEMORY),
        ("Error Code 4: Internal Error (no)", BuildFault.REFUSED),
    ],
)
def test_the_fault_is_read_from_the_words(said: str, fault: BuildFault) -> None:
    assert builder_refusal([said]).fault is fault


def test_a_missing_driver_is_not_the_cause_of_all_else() -> None:
    refusal = builder_refusal(["Error Code 4: Internal Error (no)", NO_DRIVER])
    assert (refusal.fault, refusal.text) == (BuildFault.REFUSED, "no")


def test_advice_needs_its_circumstances() -> None:
    said = "Error Code 4: API Usage Error (contradictory IOptimizationProfile kMIN)"
    assert builder_refusal([said]).text == "contradictory IOptimizationProfile kMIN"
    known = Circumstances(same_names=[("x", [0, 2, 3], "?")])
    assert "dimensions 0, 2 and 3 of 'x' the same name '?'" in builder_refusal([said], known).text


def test_many_conditionals_are_not_all_named() -> None:
    known = Circumstances(conditionals=["a", "b", "c", "d", "e"])
    text = builder_refusal(["ScopeType failed"], known).text
    assert "(If node 'a', If node 'b', If node 'c' and 2 more)" in text


def test_messages_are_bounded() -> None:
    messages = Messages()
    for index in range(1000):
        messages.add("ERROR", f"{index} " + "x" * 10_000)
        messages.add("VERBOSE", "chatter")
    assert len(messages.errors) == 100
    assert max(map(len, messages.errors)) == 4000
    assert messages.errors[0].startswith("0 ")
    assert messages.warnings == []


def test_phases_within_phases() -> None:
    told: list[tuple[str, int, int]] = []
    phases = Phases(lambda *progress: told.append(progress))
    phases.start("outer", 2)
    phases.start("inner", 1)
    assert phases.step("inner", 0)
    assert phases.step("outer", 0)
    assert phases.step("outer", 7)  # beyond what was announced
    assert phases.step("unknown", 0)
    assert told == [
        ("outer", 0, 2),
        ("inner", 0, 1),
        ("inner", 1, 1),
        ("outer", 1, 2),
        ("outer", 2, 2),
        ("unknown", 0, 0),
    ]


def test_an_exception_of_who_is_told_stops_the_build() -> None:
    told = 0

    def tell(phase: str, done: int, steps: int) -> None:
        nonlocal told
        told += 1
        raise KeyboardInterrupt

    phases = Phases(tell)
    phases.start("all", 10)
    assert not phases.step("all", 0)
    assert isinstance(phases.stopped_by, KeyboardInterrupt)
    assert told == 1
