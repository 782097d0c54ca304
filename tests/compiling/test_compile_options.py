# SPDX-License-Identifier: Apache-2.0
"""Options are read once: every mistake is named, with a line that would do."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from thirdrail.errors import InvalidArgument
from thirdrail_engines.compile_options import (
    CompileOptions,
    EngineChoice,
    OnFailure,
    TorchCompile,
    is_compile_key,
    read_compile_options,
)
from thirdrail_engines.expectations import Reference
from thirdrail_engines.plans import Precision, ShapeRange
from thirdrail_engines.profiles import BatchRows
from thirdrail_engines.reference_proof import Tolerance
from thirdrail_engines.trials import ValueRange
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig

VALID = {
    "engine": "tensorrt_rtx",
    "precision": "fp16",
    "on_compile_failure": "fail",
    "serve_while_compiling": "true",
    "profile.0.x": "1x3,4x3,8x3",
    "profile.0.a.b": "1, 2, 3",
    "profile.1.x": "9x3,9x3,9x3",
    "workspace_mib": "3",
    "builder_optimization_level": "0",
    "compute_capabilities": "sm86, sm120",
    "version_compatible": "true",
    "refit": "true",
    "timing_cache": "false",
    "plugins": "a.so, /b.so",
    "keep_optimised": "true",
    "torch_compile": "aot_inductor",
    "proof_reference": "torch",
    "tolerance.max_abs": "0.5",
    "tolerance.mean_abs": "1e-3",
    "tolerance.max_rel": "2",
    "tolerance.mean_rel": "0",
    "tolerance.cosine": "0.9",
    "tolerance.equal": "1",
    "tolerance.uncompared": "2",
    "proof.rate": "16000",
    "proof.a.b": " -0.5..7 ",
}


def test_every_key_is_read() -> None:
    rows = BatchRows(4, 8)
    assert read_compile_options(VALID, rows) == CompileOptions(
        engine=EngineChoice.TENSORRT_RTX,
        precision=Precision.FP16,
        on_failure=OnFailure.FAIL,
        serve_while_compiling=True,
        profiles=(
            {"x": ShapeRange((1, 3), (4, 3), (8, 3)), "a.b": ShapeRange((1,), (2,), (3,))},
            {"x": ShapeRange((9, 3), (9, 3), (9, 3))},
        ),
        rows=rows,
        workspace_bytes=3 << 20,
        optimization_level=0,
        compute_capabilities=("sm86", "sm120"),
        is_version_compatible=True,
        is_refittable=True,
        uses_timing_cache=False,
        plugins=(Path("a.so"), Path("/b.so")),
        keeps_optimised=True,
        torch_compile=TorchCompile.AOT_INDUCTOR,
        proof_reference=Reference.TORCH,
        tolerance=Tolerance(0.5, 1e-3, 2.0, 0.0, 0.9, 1.0, 2),
        proof_values={"rate": ValueRange(16000, 16000), "a.b": ValueRange(-0.5, 7)},
    )
    assert all(map(is_compile_key, VALID))


def test_nothing_given_is_the_default_and_keys_of_others_are_passed_over() -> None:
    assert read_compile_options({}) == CompileOptions()
    assert read_compile_options({"intra_op_thread_count": "many"}) == CompileOptions()
    assert not is_compile_key("intra_op_thread_count")


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("engine", "trt", "is 'trt', expected one of auto, onnxruntime, tensorrt, tensorrt_rtx"),
        ("precision", "FP16", "is 'FP16', expected one of as_is, fp16, bf16"),
        ("on_compile_failure", "", "is '', expected fallback or fail"),
        ("serve_while_compiling", "1", "is '1', expected true or false"),
        ("version_compatible", "yes", "expected true or false"),
        ("torch_compile", "true", "is 'true', expected eager or aot_inductor"),
        ("proof_reference", "cpu", "is 'cpu', expected onnxruntime or torch"),
        ("workspace_mib", "0", "expected a whole number of MiB from 1 to 1048576"),
        ("workspace_mib", "-1", "expected a whole number of MiB"),
        ("builder_optimization_level", "6", "expected a level from 0 to 5"),
        ("compute_capabilities", "ampere", "expected compute capabilities with commas"),
        ("compute_capabilities", "sm86,", "expected compute capabilities with commas"),
        ("plugins", "a.so,,b.so", "expected files with commas between them"),
        ("tolerance.max_abs", "-1", "expected a number of 0 or more"),
        ("tolerance.max_abs", "inf", "expected a number of 0 or more"),
        ("tolerance.cosine", "1.1", "expected a number from 0 to 1"),
        ("tolerance.cosine", "nan", "expected a number from 0 to 1"),
        ("tolerance.equal", "most", "expected a number from 0 to 1"),
        ("tolerance.uncompared", "all", "expected a number of outputs from 0"),
    ],
)
def test_a_mistake_says_what_is_allowed_and_a_line_that_would_do(
    key: str, text: str, expected: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_compile_options({key: text})
    said = str(caught.value)
    assert said.startswith(f"parameters['{key}'] is {text!r}, expected ")
    assert expected in said
    config = text_format.Parse(said.partition("for example: ")[2], ModelConfig())
    assert read_compile_options({key: config.parameters[key].string_value}) != CompileOptions()


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("profile.0.x", "1x3,2x3", "has 2 shapes, expected three: smallest,best,largest"),
        ("profile.0.x", "1x3,2x3,3", "has shapes of 2, 2, 1 dimensions, expected three of the sa"),
        ("profile.0.x", "1x3,2,x3", "has the shape 'x3', expected sizes with x between"),
        ("profile.0.x", "1,2,-1", "has the shape '-1', expected sizes with x between"),
        ("profile.0.x", "0,1,2", "has the shape 0, expected sizes from 1 to 2147483647"),
        ("profile.0.x", "1,2,2147483648", "has the shape 2147483648, expected sizes from 1"),
        ("profile.0.x", "1x2,1x4,1x3", "has the sizes [2, 4, 3] on axis 1, expected smallest <="),
        ("profile.0.x", ",".join(["x".join(["1"] * 17)] * 3), "17 dimensions, expected at most 16"),
        ("profile.0.x", "²,2,2", "has the shape '\\xb2', expected sizes"),
        ("profile.x", "1,2,3", "is no profile, expected profile.<number from 0 to 15>.<input>"),
        ("profile.0.", "1,2,3", "is no profile, expected profile.<number from 0 to 15>.<input>"),
        ("profile.16.x", "1,2,3", "is no profile, expected profile.<number from 0 to 15>"),
        ("proof.x", "", "is '', expected for an input one value, or the lowest and the highest"),
        ("proof.x", "2..1", "is '2..1', expected for an input one value"),
        ("proof.x", "0..", "is '0..', expected for an input one value"),
        ("proof.x", "nan", "is 'nan', expected for an input one value"),
        ("proof.x", "1e16", "is '1e16', expected for an input one value"),
        ("proof.", "1", "is '1', expected for an input one value"),
        ("profile.1.x", "1,2,3", "has profile.1 and no profile.0: number the profiles from 0"),
    ],
)
def test_what_is_no_profile(key: str, text: str, expected: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_compile_options({key: text})
    assert expected in str(caught.value)


@given(st.dictionaries(st.sampled_from([*VALID, "profile.0.\n", "profile."]), st.text()))
def test_any_text_is_read_or_named(parameters: dict[str, str]) -> None:
    said = "parameters"
    try:
        read_compile_options(parameters)
    except InvalidArgument as error:
        said = str(error)
    assert said.startswith("parameters")
    assert len(said) < 1000
