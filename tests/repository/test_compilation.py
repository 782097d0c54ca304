# SPDX-License-Identifier: Apache-2.0
"""From a configuration to CompileOptions: whose word counts, and what cannot be."""

import pytest
from google.protobuf import text_format

from thirdrail_engines.compile_options import CompileOptions, EngineChoice, OnFailure
from thirdrail_engines.profiles import BatchRows
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.compilation import compile_options, keep_engine
from thirdrail_server.repository.errors import RepositoryError


def parse(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig(name="m"))


def parameter(key: str, value: str) -> str:
    return f"parameters {{ key: '{key}' value {{ string_value: '{value}' }} }}"


def compiled(text: str, *, derive: int = 0, default: str = "fallback") -> CompileOptions:
    return compile_options(parse(text), on_failure=OnFailure(default), derive_batch_rows=derive)


def test_without_a_word_everything_is_as_by_default() -> None:
    assert compiled("") == CompileOptions()


def test_the_servers_policy_holds_where_the_model_has_none() -> None:
    assert compiled("", default="fail").on_failure is OnFailure.FAIL
    own = parameter("on_compile_failure", "fallback")
    assert compiled(own, default="fail").on_failure is OnFailure.FALLBACK


@pytest.mark.parametrize(
    ("text", "derive", "rows"),
    [
        ("", 0, None),
        ("", 8, BatchRows(8, 8, is_promised=False)),
        ("max_batch_size: 16", 8, BatchRows(16, 16)),
        (
            "max_batch_size: 16 dynamic_batching { preferred_batch_size: [4, 8, 32] }",
            0,
            BatchRows(8, 16),
        ),
    ],
)
def test_rows_follow_from_batching(text: str, derive: int, rows: BatchRows | None) -> None:
    assert compiled(text, derive=derive).rows == rows


def test_our_words_count_more_than_tritons() -> None:
    text = "backend: 'tensorrt'" + parameter("engine", "tensorrt_rtx")
    assert compiled(text).engine is EngineChoice.TENSORRT_RTX


def test_a_wrong_value_is_refused_with_a_line_that_would_do() -> None:
    with pytest.raises(RepositoryError, match=r"'precision'\] is 'int4'.*for example: "):
        compiled(parameter("precision", "int4"))


def test_whoever_must_not_fall_back_cannot_be_served_meanwhile() -> None:
    text = parameter("serve_while_compiling", "true")
    assert compiled(text).serve_while_compiling
    with pytest.raises(RepositoryError, match="which on_compile_failure forbids; write parameters"):
        compiled(text, default="fail")


def test_an_engine_that_the_platform_asked_for_is_kept_in_a_parameter() -> None:
    config = parse("platform: 'tensorrt_plan'")
    keep_engine(config)
    config.platform = "onnxruntime_onnx"
    kept = compile_options(config, on_failure=OnFailure.FAIL).engine
    assert kept in (EngineChoice.TENSORRT, EngineChoice.TENSORRT_RTX)
    plain = parse("platform: 'onnxruntime_onnx'")
    keep_engine(plain)
    assert not plain.parameters
