# SPDX-License-Identifier: Apache-2.0
"""What becomes of a model version on its way from its file to ready."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

from support.engines import WatchedEngine
from support.models import (
    CLASSIFIER_CONFIG,
    add,
    classifier,
    constant,
    gather,
    identity,
    model,
    slow,
    tensor,
)
from thirdrail_engines import ModelFileError
from thirdrail_server.config import ConfigError, WorkerConfig
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.worker.loading import PreparedVersion

Prepare = Callable[..., PreparedVersion]

# Bounds of trial runs that every run keeps, and none does.
ANY_US, NO_US = 1_000_000, 0


def sums(axis: int) -> onnx.ModelProto:
    """y = the running sums of x along the axis, [n, 4]. Along 0 the rows depend on each other."""
    node = helper.make_node("CumSum", ["x", "axis"], ["y"])
    shape = ("n", 4)
    inputs, outputs = [tensor("x", "FP32", shape)], [tensor("y", "FP32", shape)]
    return model([node], inputs, outputs, [constant("axis", np.array(axis))])


# Batching


def test_batching_that_nobody_configured_is_off(prepare_model: Prepare) -> None:
    prepared = prepare_model(sums(axis=1))
    assert prepared.spec.batch_rows_max == prepared.config.max_batch_size == 0
    assert prepared.notes == ()


def test_batching_is_derived_where_asked_for_and_proven(prepare_model: Prepare) -> None:
    prepared = prepare_model(sums(axis=1), derive_batch_rows=4)
    assert prepared.spec.batch_rows_max == prepared.options.queue.rows_max == 4
    assert prepared.config.max_batch_size == 4
    assert prepared.config.HasField("dynamic_batching")
    assert prepared.spec.inputs["x"].shape == (-1, 4)
    assert "single and batched rows agree" in prepared.notes[0]


def test_batching_is_not_derived_where_rows_depend_on_each_other(prepare_model: Prepare) -> None:
    prepared = prepare_model(sums(axis=0), derive_batch_rows=4)
    assert prepared.spec.batch_rows_max == 0
    assert prepared.notes[0].startswith("batching was not derived: output 'y' differs in row")


def test_a_configuration_is_not_overruled(prepare_model: Prepare) -> None:
    prepared = prepare_model(sums(axis=1), "max_batch_size: 2", derive_batch_rows=4)
    assert prepared.spec.batch_rows_max == 2


@pytest.mark.parametrize("rows", [1, -1])
def test_deriving_batches_of_one_row_makes_no_sense(rows: int) -> None:
    with pytest.raises(ConfigError, match=f"must be 0 .off. or 2 or more, got {rows}"):
        WorkerConfig(derive_batch_rows=rows)


# Instances, threads, labels


@pytest.mark.parametrize(
    ("config", "cores", "instances", "threads"),
    [
        ("", 4, 1, 4),
        ("instance_group { count: 3 }", 4, 3, 2),
        ("instance_group { count: 8 }", 4, 8, 1),
        ("instance_group { count: 1 } instance_group { count: 2 }", 4, 3, 2),
        ("parameters { key: 'intra_op_thread_count' value { string_value: '2' } }", 4, 1, 2),
        ("parameters { key: 'intra_op_thread_count' value { string_value: '0' } }", 3, 1, 3),
    ],
)
def test_instances_share_the_cores(
    prepare_model: Prepare,
    watched_engines: list[WatchedEngine],
    config: str,
    cores: int,
    instances: int,
    threads: int,
) -> None:
    prepared = prepare_model(identity(), config, cores=cores)
    (options,) = (engine.options for engine in watched_engines)
    assert options is not None
    assert options.threads_max == threads
    assert prepared.options.instances == instances


def test_labels_are_read_from_the_models_folder(prepare_model: Prepare) -> None:
    prepared = prepare_model(classifier(), CLASSIFIER_CONFIG, files={"labels.txt": "cat\ndog\n"})
    assert prepared.spec.labels == {"scores": ("cat", "dog")}


# Where it runs


def test_a_tiny_model_is_put_on_the_loop_if_its_runs_are_short(prepare_model: Prepare) -> None:
    place = prepare_model(identity(), inline_run_us_max=ANY_US, inline_overrun_us_max=500).place
    assert place.on_loop
    assert place.overrun_ns_max == 500_000
    assert not prepare_model(identity(), inline_run_us_max=NO_US).place.on_loop


@pytest.mark.parametrize(
    ("built", "config"),
    [
        (add(1), "max_batch_size: 4"),
        (identity(), "instance_group { count: 2 }"),
        (identity("FP32", (1 << 20,)), ""),
        (gather(), ""),
    ],
    ids=["batches", "two instances", "large", "an input that may be a size"],
)
def test_other_models_run_on_threads_however_short_their_runs(
    prepare_model: Prepare, built: onnx.ModelProto, config: str
) -> None:
    assert not prepare_model(built, config, inline_run_us_max=ANY_US).place.on_loop


def test_only_models_whose_shapes_decide_the_work_learn_from_their_callers(
    prepare_model: Prepare,
) -> None:
    assert prepare_model(gather()).place.learns
    assert not prepare_model(slow()).place.learns, "a loop's count decides"
    assert not prepare_model(add(1), "max_batch_size: 4").place.learns
    assert not prepare_model(identity(), "instance_group { count: 2 }").place.learns


# Warm-up


def sevenths() -> onnx.ModelProto:
    """y = x as [k, 7]: fails for other numbers of elements."""
    shape = constant("shape", np.array([-1, 7]))
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    outputs = [tensor("y", "FP32", ("k", 7))]
    return model([node], [tensor("x", "FP32", ("n",))], outputs, [shape])


WARMUP = (
    "model_warmup {{ name: 'first' count: 3 inputs {{ key: 'x' value {{ data_type: TYPE_FP32 "
    "dims: {dims} random_data: true }} }} }}"
)


def test_warm_up_runs_before_the_model_is_ready(
    prepare_model: Prepare, watched_engines: list[WatchedEngine]
) -> None:
    prepare_model(sevenths(), WARMUP.format(dims=14), inline_run_us_max=NO_US)
    with_warmup = len(watched_engines[0].threads)
    prepare_model(sevenths(), inline_run_us_max=NO_US)
    assert with_warmup - len(watched_engines[1].threads) == 3


def test_a_model_that_fails_its_warm_up_is_refused_and_closed(
    prepare_model: Prepare, watched_engines: list[WatchedEngine]
) -> None:
    with pytest.raises(ModelFileError, match=r"warm-up request 'first' failed: .* Reshape node: "):
        prepare_model(sevenths(), WARMUP.format(dims=15))
    assert [engine.closed.is_set() for engine in watched_engines] == [True]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("max_batch_size: 4", "must have -1 .any number of rows. as its first dimension"),
        ("input { name: 'z' data_type: TYPE_FP32 dims: [ -1 ] }", "declared"),
        (
            "model_warmup { name: 'w' inputs { key: 'z' value { data_type: TYPE_FP32 dims: 1 "
            "zero_data: true } } }",
            "unknown inputs",
        ),
        ("parameters { key: 'intra_op_thread_count' value { string_value: '-1' } }", "got '-1'"),
        ("instance_group { count: 257 }", "256 at most together"),
    ],
    ids=["rows", "inputs", "warm-up", "threads", "instances"],
)
def test_a_configuration_that_does_not_fit_is_refused_and_nothing_stays_loaded(
    prepare_model: Prepare, watched_engines: list[WatchedEngine], config: str, text: str
) -> None:
    fixed = identity("FP32", (3,))
    with pytest.raises(RepositoryError, match=text):
        prepare_model(fixed, config)
    assert all(engine.closed.is_set() for engine in watched_engines)


def test_phases_are_told_in_order(prepare_model: Prepare) -> None:
    phases: list[str] = []
    prepare_model(
        sums(axis=1), derive_batch_rows=2, tell=lambda phase, _step, _steps: phases.append(phase)
    )
    assert phases == ["building", "proving", "warming up"]
    phases.clear()
    prepare_model(sums(axis=1), tell=lambda phase, _step, _steps: phases.append(phase))
    assert phases == ["building", "warming up"]
