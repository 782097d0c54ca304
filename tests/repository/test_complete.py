# SPDX-License-Identifier: Apache-2.0
"""Completing configurations from the engine's tensors, and catching contradictions."""

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from thirdrail.dtypes import BY_NAME, DTYPES, DType
from thirdrail.tensors import TensorSpec
from thirdrail_engines.engine import EngineSpec
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.complete import complete, may_derive_batching
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.fields import check_fields
from thirdrail_server.repository.model_config import parse_text
from thirdrail_server.repository.specs import config_type_of, dtype_of_config, input_specs
from thirdrail_server.repository.suggest import suggest_config_text


def tensor(name: str, dtype: str, *shape: int, optional: bool = False) -> TensorSpec:
    return TensorSpec(name, BY_NAME[dtype], shape, optional)


def spec(inputs: list[TensorSpec], outputs: list[TensorSpec]) -> EngineSpec:
    return EngineSpec(tuple(inputs), tuple(outputs), "onnxruntime_onnx", frozenset())


MODEL = spec(
    [tensor("x", "FP32", -1, 16), tensor("ids", "INT64", -1, -1, optional=True)],
    [tensor("y", "BYTES", -1), tensor("z", "FP32", -1, 2)],
)
FIXED = spec([tensor("x", "FP32", 8, 16)], [tensor("y", "FP32", 8)])


def parse(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig(name="m"))


def test_without_a_configuration_everything_is_read_from_the_model() -> None:
    assert complete("m", None, MODEL) == parse("""
        platform: "onnxruntime_onnx" backend: "onnxruntime" default_model_filename: "model.onnx"
        version_policy { latest { num_versions: 1 } }
        input [{ name: "x" data_type: TYPE_FP32 dims: [-1, 16] },
               { name: "ids" data_type: TYPE_INT64 dims: [-1, -1] optional: true }]
        output [{ name: "y" data_type: TYPE_STRING dims: [-1] },
                { name: "z" data_type: TYPE_FP32 dims: [-1, 2] }]
        instance_group { count: 1 kind: KIND_CPU }
        """)


def test_the_given_configuration_is_not_changed() -> None:
    given_config = parse("max_batch_size: 4")
    before = ModelConfig()
    before.CopyFrom(given_config)
    complete("m", given_config, MODEL)
    assert given_config == before


def test_with_max_batch_size_dims_leave_the_rows_out() -> None:
    whole = complete("m", parse("max_batch_size: 4"), MODEL)
    assert [list(each.dims) for each in whole.input] == [[16], [-1]]
    assert [list(each.dims) for each in whole.output] == [[], [2]]
    assert [each.shape for each in input_specs(whole)] == [(-1, 16), (-1, -1)]
    assert not whole.HasField("dynamic_batching")


def test_completing_twice_changes_nothing() -> None:
    for text in ("", "max_batch_size: 4", "instance_group [{ count: 2 }, {}]"):
        whole = complete("m", parse(text), MODEL)
        assert complete("m", whole, MODEL) == whole


def test_what_is_declared_stays() -> None:
    whole = complete(
        "m",
        parse("""
            platform: "onnxruntime" default_model_filename: "small.onnx"
            version_policy { all {} } instance_group [{ count: 2 }, { kind: KIND_MODEL }]
            input { name: "x" dims: [3, 16] } output { name: "z" data_type: TYPE_FP32 }
            """),
        MODEL,
    )
    assert [(each.name, list(each.dims)) for each in whole.input] == [("x", [3, 16])]
    assert [(each.name, list(each.dims)) for each in whole.output] == [("z", [-1, 2])]
    assert whole.platform == "onnxruntime_onnx"
    assert whole.default_model_filename == "small.onnx"
    assert whole.version_policy.HasField("all")
    assert [group.count for group in whole.instance_group] == [2, 1]


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("input { name: 'a' }", "inputs ['a'] are declared, the model file also needs ['x']"),
        (
            "input [{ name: 'x' }, { name: 'a' }]",
            "input 'a' is declared, but the model file has ['x', 'ids']",
        ),
        ("output { name: 'a' }", "output 'a' is declared, but the model file has ['y', 'z']"),
        ("input [{ name: 'x' }, { name: 'x' }]", "input 'x' is declared twice"),
        ("input {}", "input[0] needs a name of 1 to 1024 characters"),
        (
            "input { name: 'x' data_type: TYPE_INT64 }",
            "input 'x' is declared INT64, but the model file has FP32",
        ),
        (
            "input { name: 'x' dims: [16] }",
            "input 'x' is declared with dims [16], but the model file has [-1, 16]",
        ),
        (
            "input { name: 'x' dims: [-1, -1] }",
            "input 'x' is declared with dims [-1, -1], but the model file has [-1, 16]",
        ),
        (
            "max_batch_size: 2 input { name: 'x' dims: [-1, 16] }",
            "input 'x' is declared with dims [-1, 16], but the model file has [16] "
            "after the dimension for rows",
        ),
        (
            "input { name: 'x' optional: true }",
            "input 'x' is declared optional, but the model file needs it",
        ),
        ("max_batch_size: -2", "max_batch_size must be 0 or more, got -2"),
    ],
)
def test_contradictions_are_refused(text: str, refusal: str) -> None:
    with pytest.raises(RepositoryError) as caught:
        complete("m", parse(text), MODEL)
    assert str(caught.value) == f"model 'm': {refusal}"


@pytest.mark.parametrize("text", ["platform: 'ensemble'", "sequence_batching {}"])
def test_fields_that_are_not_served_are_refused(text: str) -> None:
    with pytest.raises(RepositoryError, match="not served by this version of Thirdrail"):
        complete("m", parse(text), MODEL)


def test_a_fixed_first_dimension_takes_no_batches() -> None:
    with pytest.raises(RepositoryError) as caught:
        complete("m", parse("max_batch_size: 8"), FIXED)
    assert str(caught.value) == (
        "model 'm': max_batch_size is 8, so input 'x' must have -1 (any number of rows) as its "
        "first dimension, but the model file has [8, 16]"
    )
    one = spec([tensor("x", "FP32", 1, 16)], [tensor("y", "FP32", 1)])
    assert list(complete("m", parse("max_batch_size: 1"), one).input[0].dims) == [16]
    with pytest.raises(RepositoryError, match="first dimension"):
        complete("m", parse("max_batch_size: 2"), one)


def test_an_output_whose_shape_the_model_file_leaves_out() -> None:
    vague = spec([tensor("x", "FP32", -1)], [tensor("y", "FP32")])
    declared = complete("m", parse("max_batch_size: 2 output { name: 'y' dims: [3] }"), vague)
    assert list(declared.output[0].dims) == [3]
    with pytest.raises(RepositoryError, match=r"output 'y' must have -1 .* has \[\]"):
        complete("m", parse("max_batch_size: 2"), vague)
    assert list(complete("m", None, vague).output[0].dims) == []


def test_proven_rows_become_a_batching_configuration() -> None:
    whole = complete("m", None, MODEL, proven_rows=16)
    assert whole.max_batch_size == 16
    assert whole.HasField("dynamic_batching")
    assert [list(each.dims) for each in whole.input] == [[16], [-1]]


@pytest.mark.parametrize(
    "text",
    [
        "max_batch_size: 2",
        "dynamic_batching {}",
        "input { name: 'x' }",
        "output { name: 'y' }",
    ],
)
def test_what_the_owner_wrote_about_batching_stands(text: str) -> None:
    assert not may_derive_batching(parse(text), MODEL)
    assert complete("m", parse(text), MODEL, proven_rows=16) == complete("m", parse(text), MODEL)


def test_batching_is_derived_only_where_every_first_dimension_is_open() -> None:
    assert may_derive_batching(None, MODEL)
    assert may_derive_batching(parse("instance_group { count: 2 }"), MODEL)
    open_x = tensor("x", "FP32", -1)
    for model in (
        FIXED,
        spec([open_x, tensor("s", "FP32")], [open_x]),
        spec([open_x], [tensor("y", "FP32", 3)]),
        spec([], [open_x]),
    ):
        assert not may_derive_batching(None, model)


@pytest.mark.parametrize("row", DTYPES, ids=lambda row: row.name)
def test_element_types_there_and_back(row: DType) -> None:
    assert dtype_of_config("tensor", config_type_of(row)) is row


@pytest.mark.parametrize("rows", [0, 16])
@pytest.mark.parametrize("text", ["", "max_batch_size: 4", "instance_group { count: 2 }"])
def test_a_suggested_configuration_says_the_same(text: str, rows: int) -> None:
    given_config = parse(text)
    whole = complete("m", given_config, MODEL, proven_rows=rows)
    suggested = suggest_config_text(whole, given_config)
    assert parse_text(suggested.encode(), "m") == whole
    assert check_fields(whole) == ()
    assert complete("m", parse_text(suggested.encode(), "m"), MODEL) == whole


def test_a_suggestion_tells_what_was_derived_and_what_was_given() -> None:
    derived = suggest_config_text(complete("m", None, MODEL, proven_rows=16), None)
    assert "# Derived: up to so many rows" in derived
    assert "# Derived: requests that wait at the same time share a batch.\n" in derived
    assert "# Read from the model file.\ninput {" in derived

    given_config = parse("max_batch_size: 4 input { name: 'x' }")
    given_text = suggest_config_text(complete("m", given_config, MODEL), given_config)
    assert "Derived" not in given_text
    assert "# Read from the model file.\ninput {" not in given_text
    assert "Batching is off" not in given_text
    assert "# Batching is off" in suggest_config_text(complete("m", None, MODEL), None)


def test_the_advice_in_a_suggestion_works() -> None:
    advised = parse(
        "max_batch_size: 4 dynamic_batching {} input { name: 'x' dims: [16] } output { name: 'z' }"
    )
    assert complete("m", advised, MODEL).max_batch_size == 4


DIMS = st.lists(st.integers(-1, 4), max_size=3)


@given(DIMS, DIMS, st.integers(0, 2))
def test_a_declaration_that_is_accepted_admits_no_shape_the_model_refuses(
    declared: list[int], shape: list[int], rows_max: int
) -> None:
    engine = spec([tensor("x", "FP32", *shape)], [tensor("y", "FP32", -1)])
    config = ModelConfig(max_batch_size=rows_max)
    config.input.add(name="x", dims=declared)
    try:
        [accepted] = input_specs(complete("m", config, engine))
    except RepositoryError:
        return
    assert len(accepted.shape) == len(shape)
    for dim, allowed in zip(accepted.shape, shape, strict=True):
        assert allowed in (-1, dim) or (rows_max == 1 and allowed == 1)
