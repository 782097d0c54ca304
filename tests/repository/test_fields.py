# SPDX-License-Identifier: Apache-2.0
"""The field table is complete, and each row does what it says."""

from collections.abc import Iterator

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository import fields
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.fields import FIELDS, Fate, check_fields


def rows(fate: Fate) -> list[str]:
    return [path for path, rule in FIELDS.items() if rule.fate is fate]


def value_type(field: FieldDescriptor) -> Descriptor | None:
    """The message below a field; for a map, the one that its values are."""
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        return message.fields_by_name["value"].message_type
    return message


def unjudged(message: Descriptor, path: str) -> Iterator[str]:
    """The fields that no row speaks for."""
    for field in message.fields:
        here = f"{path}{field.name}"
        rule, below = FIELDS.get(here), value_type(field)
        if rule is not None and rule.fate is not Fate.HONOURED:
            continue
        if below is not None and below.fields:
            yield from unjudged(below, f"{here}.")
        elif rule is None:
            yield here


def test_every_field_of_the_configuration_has_a_row() -> None:
    assert list(unjudged(ModelConfig.DESCRIPTOR, "")) == []


def test_a_missing_row_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FIELDS, "instance_group.host_policy")
    monkeypatch.delitem(FIELDS, "optimization.cuda")
    missing = list(unjudged(ModelConfig.DESCRIPTOR, ""))
    assert "instance_group.host_policy" in missing
    assert "optimization.cuda.graphs" in missing


@pytest.mark.parametrize("path", FIELDS)
def test_every_row_is_about_a_field(path: str) -> None:
    message: Descriptor | None = ModelConfig.DESCRIPTOR
    for name in path.split("."):
        assert message is not None
        message = value_type(message.fields_by_name[name])


@pytest.mark.parametrize("path", rows(Fate.HARMLESS) + rows(Fate.REFUSED))
def test_no_row_hides_below_another_that_speaks_for_it(path: str) -> None:
    parts = path.split(".")
    above = [".".join(parts[:length]) for length in range(1, len(parts))]
    assert all(FIELDS[row].fate is Fate.HONOURED for row in above if row in FIELDS)


VALUES = {
    FieldDescriptor.CPPTYPE_STRING: "'key'",
    FieldDescriptor.CPPTYPE_BOOL: "true",
}


def example(message: Descriptor, path: list[str]) -> str:
    """A text that sets the field at `path`, or the first field below it, to no default value."""
    field = message.fields_by_name[path[0]] if path else message.fields[0]
    below = field.message_type
    if below is None:
        return f"{field.name}: {VALUES.get(field.cpp_type, 1)}"
    if not below.fields:
        return f"{field.name} {{}}"
    if not below.GetOptions().map_entry:
        return f"{field.name} {{ {example(below, path[1:])} }}"
    key = example(below, ["key"])
    return f"{field.name} {{ {key} {example(below, ['value', *path[1:]])} }}"


def parse(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig(name="m"))


def config_with(path: str) -> ModelConfig:
    """A configuration that sets the field at `path`."""
    if path == "name":
        return ModelConfig(name="m")
    return parse(example(ModelConfig.DESCRIPTOR, path.split(".")))


@pytest.mark.parametrize("path", rows(Fate.HARMLESS))
def test_a_harmless_field_loads_with_a_warning(path: str) -> None:
    [warning] = check_fields(config_with(path))
    place, _, why = warning.partition(" is ignored: ")
    assert place.replace("[0]", "").replace("[key]", "") == path
    assert why == FIELDS[path].text
    assert len(why) > 10


@pytest.mark.parametrize("path", rows(Fate.REFUSED))
def test_a_refused_field_fails_the_load(path: str) -> None:
    with pytest.raises(RepositoryError) as caught:
        check_fields(config_with(path))
    start, _, rest = str(caught.value).partition(f": {FIELDS[path].text}")
    assert start.replace("[0]", "") == f"model 'm': {path}"
    assert rest == ""
    assert "not served by this version of Thirdrail" in FIELDS[path].text


# Honoured for some values only, which have tests of their own below.
GPU_ACCELERATOR = "optimization.execution_accelerators.gpu_execution_accelerator"
JUDGED = {
    "platform",
    "backend",
    "parameters",
    "parameters.string_value",
    GPU_ACCELERATOR,
    f"{GPU_ACCELERATOR}.name",
    f"{GPU_ACCELERATOR}.parameters",
}
ACCELERATOR = (
    "optimization { execution_accelerators { gpu_execution_accelerator { "
    "name: 'tensorrt' parameters { %s } } } }"
)


@pytest.mark.parametrize("path", sorted({*rows(Fate.HONOURED)} - JUDGED))
def test_an_honoured_field_brings_no_warning(path: str) -> None:
    assert check_fields(config_with(path)) == ()


@pytest.mark.parametrize(
    "text",
    [
        "model_transaction_policy { decoupled: false }",
        "model_transaction_policy {}",
        "input { name: 'x' dims: [2, 3] reshape { shape: [2, 3] } }",
        "output { name: 'y' dims: [] reshape { shape: [] } }",
        "input { allow_ragged_batch: false is_shape_tensor: false }",
        "optimization {}",
        "response_cache { enable: false }",
        "optimization { input_pinned_memory { enable: false } }",
        "model_repository_agents {}",
        "backend: 'onnxruntime'",
        "platform: 'onnxruntime_onnx'",
        "backend: 'onnxruntime_onnx'",
        "platform: 'tensorrt_plan'",
        "backend: 'pytorch'",
        ACCELERATOR % "key: 'precision_mode' value: 'FP16'",
        ACCELERATOR % "key: 'max_workspace_size_bytes' value: '1073741824'",
        "parameters { key: 'profile.0.x' value { string_value: '1,2,3' } }",
        "parameters { key: 'engine' value { string_value: 'onnxruntime' } }",
        "instance_group [{ kind: KIND_CPU }, { kind: KIND_AUTO }, { kind: KIND_MODEL }]",
        "instance_group [{ kind: KIND_GPU gpus: [1] }]",
        "parameters { key: 'intra_op_thread_count' value { string_value: '2' } }",
    ],
)
def test_values_that_change_nothing_are_not_complained_about(text: str) -> None:
    assert check_fields(parse(text)) == ()


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (
            "backend: 'python'",
            "backend: models written in Python are not served by this version of Thirdrail",
        ),
        (
            "platform: 'ensemble'",
            "platform: ensembles are not served by this version of Thirdrail",
        ),
        (
            "backend: 'mine'",
            "backend: 'mine' is not served by this version of Thirdrail, expected one of "
            "onnxruntime, onnxruntime_onnx, tensorrt, tensorrt_plan, tensorrt_rtx, pytorch, "
            "pytorch_libtorch, pytorch_exported",
        ),
        (
            ACCELERATOR % "key: 'precision_mode' value: 'INT8'",
            f"{GPU_ACCELERATOR}: precision_mode 'INT8' is none of FP32, FP16, BF16; INT8 and FP8 "
            "come from the graph, which must have quantisation nodes (Q/DQ)",
        ),
        (
            ACCELERATOR % "key: 'max_workspace_size_bytes' value: '1G'",
            f"{GPU_ACCELERATOR}: max_workspace_size_bytes must be a number of bytes above 0, got "
            "'1G'",
        ),
        (
            "sequence_batching {}",
            "sequence_batching: models with sequences are not served by this version of Thirdrail",
        ),
        (
            "model_transaction_policy { decoupled: true }",
            "model_transaction_policy.decoupled: decoupled models are not served by this version "
            "of Thirdrail",
        ),
    ],
)
def test_the_texts_of_refusals(text: str, refusal: str) -> None:
    with pytest.raises(RepositoryError) as caught:
        check_fields(parse(text))
    assert str(caught.value) == f"model 'm': {refusal}"


def test_unknown_parameters_are_named() -> None:
    config = parse("")
    for key in ("b", "a", "intra_op_thread_count", "engine"):
        config.parameters[key].string_value = "1"
    assert check_fields(config) == (
        "parameters is ignored: 'a', 'b' not known; docs/compile.md lists those that are",
    )


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (
            ACCELERATOR % "key: 'trt_engine_cache_enable' value: 'true'",
            "trt_engine_cache_enable not known, only precision_mode, max_workspace_size_bytes",
        ),
        (
            "optimization { execution_accelerators { gpu_execution_accelerator { name: 'x' } } }",
            "'x' is not known here, only 'tensorrt'",
        ),
    ],
)
def test_unknown_accelerators_are_named(text: str, warning: str) -> None:
    assert check_fields(parse(text)) == (f"{GPU_ACCELERATOR} is ignored: {warning}",)


def test_all_refusals_come_at_once_and_their_number_is_bounded() -> None:
    with pytest.raises(RepositoryError) as caught:
        check_fields(parse("input [{ is_shape_tensor: true }, { allow_ragged_batch: true }]"))
    assert "input[0].is_shape_tensor" in str(caught.value)
    assert "input[1].allow_ragged_batch" in str(caught.value)

    config = parse("")
    for _ in range(fields.FINDINGS_MAX + 5):
        config.instance_group.add(host_policy="x")
    warnings = check_fields(config)
    assert len(warnings) == fields.FINDINGS_MAX + 1
    assert warnings[-1] == "and 5 more"


def test_a_refusal_outweighs_warnings() -> None:
    with pytest.raises(RepositoryError) as caught:
        check_fields(parse("response_cache { enable: true } ensemble_scheduling {}"))
    assert "response_cache" not in str(caught.value)


def test_rows_below_a_map_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIELDS, "model_warmup.inputs.dims", fields.harmless("of no use"))
    config = parse("model_warmup { inputs { key: 'x' value { dims: [1] } } }")
    assert check_fields(config) == ("model_warmup[0].inputs[x].dims is ignored: of no use",)
