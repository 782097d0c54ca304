# SPDX-License-Identifier: Apache-2.0
"""The engine contract suite for the torch engine, as far as its operators are translated.

Left out: text, inputs with defaults and unknown ranks, which no program of torch.export has.
Results are written in place where they would be copied all the same: an input that is returned.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from engines.conftest import build_model_fixture, identity, write_model
from engines.test_engine_contract import (
    ELEMENT_TYPES,
    NUMERIC,
    sample,
    test_a_boolean_byte_other_than_zero_or_one_is_true_and_reveals_nothing,
    test_a_constant_result_is_not_the_weights,
    test_eight_threads_share_one_engine,
    test_large_results_of_every_numeric_type_are_written_into_the_callers_array,
    test_only_wanted_outputs_come_back,
    test_read_only_inputs_are_accepted,
    test_results_never_share_memory_with_inputs,
    test_results_outlive_the_engine,
    test_small_results_come_in_the_callers_array_or_another,
)
from engines.test_engine_failures import (
    test_an_array_that_does_not_fit_is_refused_and_untouched,
    test_what_does_not_fit_the_model_is_an_engine_error,
)
from thirdrail_engines import Engine, EngineOptions

pytestmark = pytest.mark.needs_torch

__all__ = [  # fixtures and tests, collected here with the engine of this module
    "build_model_fixture",
    "identity",
    "test_a_boolean_byte_other_than_zero_or_one_is_true_and_reveals_nothing",
    "test_a_constant_result_is_not_the_weights",
    "test_an_array_that_does_not_fit_is_refused_and_untouched",
    "test_eight_threads_share_one_engine",
    "test_large_results_of_every_numeric_type_are_written_into_the_callers_array",
    "test_only_wanted_outputs_come_back",
    "test_read_only_inputs_are_accepted",
    "test_results_never_share_memory_with_inputs",
    "test_results_outlive_the_engine",
    "test_small_results_come_in_the_callers_array_or_another",
    "test_what_does_not_fit_the_model_is_an_engine_error",
    "write_model",
]


@pytest.fixture
def load_model() -> Iterator[Callable[..., Engine]]:
    """Load an ONNX file on PyTorch, for the length of the test."""
    from support.torch_graphs import save_graph
    from thirdrail_engines.torch_engine import load_torch

    engines: list[Engine] = []

    def load_one(path: Path, threads_max: int = 1) -> Engine:
        engines.append(load_torch(save_graph(path), options=EngineOptions(threads_max)))
        return engines[-1]

    yield load_one
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("name", NUMERIC)
def test_every_numeric_type_passes_unchanged(identity: Callable[..., Engine], name: str) -> None:
    engine = identity(ELEMENT_TYPES[name])
    x = sample(name)
    assert engine.spec.inputs[0].dtype.name == engine.spec.outputs[0].dtype.name == name
    y = engine.run({"x": x}, ["y"], {})["y"]
    assert y.dtype == x.dtype
    assert y.tolist() == x.tolist()
    assert not np.shares_memory(x, y)


@pytest.mark.parametrize("name", ["FP32", "BF16"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0, 4), (1, 1)], ids=str)
def test_scalars_and_empty_tensors(
    identity: Callable[..., Engine], name: str, shape: tuple[int, ...]
) -> None:
    engine = identity(ELEMENT_TYPES[name], [f"d{i}" for i in range(len(shape))])
    x = sample(name, int(np.prod(shape))).reshape(shape)
    y = engine.run({"x": x}, ["y"], {"y": np.zeros_like(x)})["y"]
    assert (y.shape, y.tolist()) == (shape, x.tolist())
