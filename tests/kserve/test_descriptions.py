# SPDX-License-Identifier: Apache-2.0
"""Metadata, statistics, index lines and load parameters: the pure translations around the calls."""

import re
from typing import Any

import pytest
from google.protobuf import json_format

from thirdrail.errors import InvalidArgument, Unimplemented
from thirdrail.v1 import metrics_pb2, models_pb2
from thirdrail_server.front.control.served_model import ServedModel, VersionStatus
from thirdrail_server.front.kserve import metadata, repository, statistics
from thirdrail_server.inference import grpc_service_pb2 as kserve

Parameter = kserve.ModelRepositoryParameter


def config_of(**fields: Any) -> kserve.ModelConfig:
    return kserve.ModelConfig(
        name="M",
        platform="onnxruntime_onnx",
        input=[kserve.ModelInput(name="X", data_type=kserve.TYPE_STRING, dims=[-1, 3])],
        output=[kserve.ModelOutput(name="Y", data_type=kserve.TYPE_BF16, dims=[])],
        **fields,
    )


def test_server_metadata_lists_what_is_served() -> None:
    message = metadata.server_metadata("triton", "1.2")
    assert (message.name, message.version) == ("triton", "1.2")
    assert "statistics" in message.extensions  # perf_analyzer asks for none without it
    assert "system_shared_memory" not in message.extensions
    with_regions = metadata.server_metadata("triton", "1.2", ["system_shared_memory"])
    assert set(with_regions.extensions) - set(message.extensions) == {"system_shared_memory"}


def test_model_metadata_without_batching_shows_the_shapes_as_declared() -> None:
    message = metadata.model_metadata(config_of(), [1, 12])
    tensor = kserve.ModelMetadataResponse.TensorMetadata
    assert message == kserve.ModelMetadataResponse(
        name="M",
        versions=["1", "12"],
        platform="onnxruntime_onnx",
        inputs=[tensor(name="X", datatype="BYTES", shape=[-1, 3])],
        outputs=[tensor(name="Y", datatype="BF16", shape=[])],
    )


def test_model_metadata_with_batching_adds_the_batch_dimension() -> None:
    message = metadata.model_metadata(config_of(max_batch_size=8), [1])
    assert list(message.inputs[0].shape) == [-1, -1, 3]
    assert list(message.outputs[0].shape) == [-1]


def counters() -> metrics_pb2.ModelCounters:
    return metrics_pb2.ModelCounters(
        name="M",
        version=2,
        requests_ok=10,
        requests_failed=1,
        requests_refused=2,
        requests_timed_out=3,
        requests_cancelled=4,
        rows=30,
        batches=5,
        queue_ns=100,
        input_copy_ns=200,
        compute_ns=300,
        output_copy_ns=400,
        total_ns=1100,
        failed_ns=77,
        last_request_unix_ms=1_700_000_000_000,
        batch_sizes=[
            metrics_pb2.BatchCounters(
                rows=8, batches=3, input_copy_ns=1, compute_ns=2, output_copy_ns=3
            ),
            metrics_pb2.BatchCounters(
                rows=3, batches=2, input_copy_ns=4, compute_ns=5, output_copy_ns=6
            ),
        ],
    )


def test_every_counter_has_its_place_in_the_statistics() -> None:
    expected = kserve.ModelStatistics(
        name="M",
        version="2",
        last_inference=1_700_000_000_000,
        inference_count=30,
        execution_count=5,
        inference_stats=kserve.InferStatistics(
            success=duration(10, 1100),
            fail=duration(10, 77),
            queue=duration(10, 100),
            compute_input=duration(10, 200),
            compute_infer=duration(10, 300),
            compute_output=duration(10, 400),
            cache_hit=duration(0, 0),
            cache_miss=duration(0, 0),
        ),
        batch_stats=[batch_statistics(3, 2, (4, 5, 6)), batch_statistics(8, 3, (1, 2, 3))],
    )
    assert statistics.model_statistics("M", 2, counters()) == expected


def duration(count: int, ns: int) -> kserve.StatisticDuration:
    return kserve.StatisticDuration(count=count, ns=ns)


def batch_statistics(
    rows: int, batches: int, ns: tuple[int, int, int]
) -> kserve.InferBatchStatistics:
    return kserve.InferBatchStatistics(
        batch_size=rows,
        compute_input=duration(batches, ns[0]),
        compute_infer=duration(batches, ns[1]),
        compute_output=duration(batches, ns[2]),
    )


def figures(message: kserve.ModelStatistics) -> list[int]:
    """Every number of the statistics, zeros included, in the order of the fields."""
    text = json_format.MessageToJson(message, always_print_fields_with_no_presence=True)
    return [int(number) for number in re.findall(r': "?(\d+)"?', text)]


@pytest.mark.parametrize(
    "counter",
    [
        field.name
        for field in metrics_pb2.ModelCounters.DESCRIPTOR.fields
        if field.name not in ("name", "version", "batch_sizes")
    ],
)
def test_no_figure_goes_down_when_a_counter_goes_up(counter: str) -> None:
    before = counters()
    after = counters()
    setattr(after, counter, getattr(before, counter) + 1)
    earlier = figures(statistics.model_statistics("M", 2, before))
    later = figures(statistics.model_statistics("M", 2, after))
    assert len(earlier) == 34
    assert all(a <= b for a, b in zip(earlier, later, strict=True))


def test_a_model_that_was_never_asked_has_zeros() -> None:
    message = statistics.model_statistics("M", 1, None)
    assert (message.name, message.version, sum(figures(message)[1:])) == ("M", "1", 0)
    assert message.inference_stats.HasField("success")


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (models_pb2.MODEL_STATE_READY, "READY"),
        (models_pb2.MODEL_STATE_LOADING, "LOADING"),
        (models_pb2.MODEL_STATE_UNLOADING, "UNLOADING"),
        (models_pb2.MODEL_STATE_UNAVAILABLE, "UNAVAILABLE"),
        (models_pb2.MODEL_STATE_UNSPECIFIED, "UNKNOWN"),
    ],
)
def test_the_index_has_a_line_per_version(
    state: models_pb2.ModelState.ValueType, word: str
) -> None:
    model = ServedModel("M", (VersionStatus(0, state), VersionStatus(3, state, "why")))
    assert [*repository.model_index(model)] == [
        repository.ModelIndex(name="M", version="", state=word),
        repository.ModelIndex(name="M", version="3", state=word, reason="why"),
    ]


# Load and unload


def test_a_load_without_parameters_takes_what_the_repository_has() -> None:
    assert repository.load_overrides("M", {}) == repository.LoadOverrides(None, {})


def test_a_config_may_write_its_numbers_as_strings() -> None:
    text = '{"max_batch_size": "16", "dynamic_batching": {"preferred_batch_size": ["4", 8]}}'
    overrides = repository.load_overrides(
        "M",
        {
            "config": Parameter(string_param=text),
            "file:1/model.onnx": Parameter(bytes_param=b"graph"),
        },
    )
    assert overrides.config is not None
    assert overrides.config.max_batch_size == 16
    assert list(overrides.config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert overrides.files == {"1/model.onnx": b"graph"}


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"speed": Parameter(bool_param=True)}, "unrecognized load parameter 'speed'."),
        (
            {"config": Parameter(bytes_param=b"{}")},
            "invalid value type for repository parameter 'config', expected string_param.",
        ),
        (
            {"config": Parameter(string_param="{}"), "file:a": Parameter(string_param="x")},
            "invalid value type for repository parameter 'file:a', expected bytes_param.",
        ),
        (
            {"file:1/model.onnx": Parameter(bytes_param=b"")},
            "a 'file:' parameter needs a 'config' parameter beside it, which describes the model",
        ),
    ],
)
def test_bad_load_parameters_are_refused(parameters: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        repository.load_overrides("M", parameters)
    assert caught.value.message == text


@pytest.mark.parametrize(
    "config", ["", "[]", "{", '{"no_such_field": 1}', '{"max_batch_size": "x"}', "[" * 100_000]
)
def test_a_config_that_describes_no_model_is_refused(config: str) -> None:
    with pytest.raises(InvalidArgument):
        repository.load_overrides("M", {"config": Parameter(string_param=config)})


def test_unload_takes_one_flag() -> None:
    repository.check_unload({"unload_dependents": Parameter(bool_param=True)})
    with pytest.raises(InvalidArgument, match=r"^unrecognized unload parameter 'x'\.$"):
        repository.check_unload({"x": Parameter(bool_param=True)})
    with pytest.raises(InvalidArgument, match=r"'unload_dependents', expected bool_param\.$"):
        repository.check_unload({"unload_dependents": Parameter(int64_param=1)})


def test_a_repository_name_is_not_supported() -> None:
    repository.refuse_repository_name("")
    with pytest.raises(Unimplemented) as caught:
        repository.refuse_repository_name("r")
    assert caught.value.message == "'repository_name' specification is not supported"
