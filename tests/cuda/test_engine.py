# SPDX-License-Identifier: Apache-2.0
"""The engine for devices, on a twin: types, shapes and memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.conftest import WriteModel
from engines.test_engine_contract import ELEMENT_TYPES
from support.twin_runs import FLOAT, Load, Node, compute_stream, wait_until
from support.twins import twin_engine
from thirdrail_engines import Engine, Inspector, ModelFileError
from thirdrail_engines.cuda.twin import TWIN_FACTS, TwinDevice
from thirdrail_engines.engine import EngineError, EngineInputError
from thirdrail_engines.plans import Profile, ShapeRange

TYPES = sorted(name for name in ELEMENT_TYPES if name != "BYTES")


# Types and shapes


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, (2, 3)) for name in TYPES] + [("FP32", shape) for shape in ((), (0,), (0, 3))],
    ids=str,
)
def test_every_type_and_shape_passes_unchanged(
    identity: Callable[..., Engine], name: str, shape: tuple[int, ...]
) -> None:
    engine = identity(ELEMENT_TYPES[name], [f"d{axis}" for axis in range(len(shape))])
    dtype = engine.spec.inputs[0].dtype.numpy
    assert dtype is not None
    x = np.arange(int(np.prod(shape))).astype(dtype).reshape(shape)
    y = engine.run({"x": x}, ["y"], {})["y"]
    assert (y.shape, y.dtype, y.tolist()) == (shape, x.dtype, x.tolist())


def test_a_shape_that_no_profile_takes_is_refused_with_those_that_are(
    double: Path, load_model: Load
) -> None:
    profiles = tuple(
        Profile({"x": ShapeRange((low,), (low,), (high,))}) for low, high in ((1, 4), (100, 200))
    )
    engine = load_model(double, profiles=profiles)
    for count in (1, 4, 100, 200):
        assert engine.run({"x": np.ones(count, np.float32)}, ["y"], {})["y"].shape == (count,)
    with pytest.raises(EngineInputError) as caught:
        engine.run({"x": np.ones(50, np.float32)}, ["y"], {})
    assert str(caught.value) == (
        "input 'x' has the shape [50], this model takes [1] to [4] or [100] to [200]"
    )


def test_a_result_whose_size_only_the_run_tells(nonzero: Path, load_model: Load) -> None:
    engine = load_model(nonzero)
    for found in (0, 1, 1000, 3):
        x = np.zeros(2000, np.float32)
        x[:found] = 1
        answer = engine.run({"x": x}, ["y", "minus"], {})
        assert answer["y"].tolist() == [list(range(found))]
        assert answer["minus"].tolist() == (-x).tolist()
    target = np.zeros((1, 3), np.int64)
    assert engine.run({"x": x}, ["y"], {"y": target})["y"].tolist() == [[0, 1, 2]]


def test_a_result_that_is_too_large_fails_its_run_alone(nonzero: Path, load_model: Load) -> None:
    engine = load_model(nonzero, open_output_bytes_max=80)
    x = np.zeros(100, np.float32)
    x[:11] = 1
    with pytest.raises(EngineError, match="output 'y': takes 88 bytes, at most 80 are allowed"):
        engine.run({"x": x}, ["y"], {})
    x[10] = 0
    assert engine.run({"x": x}, ["y"], {})["y"].shape == (1, 10)


def test_an_input_changed_during_the_run_changes_nothing(double: Path, load_model: Load) -> None:
    """What is computed with is a copy that was made before the engine began to wait."""
    engine = load_model(double)
    x = np.ones(100_000, np.float32)
    with ThreadPoolExecutor(1) as pool:
        with compute_stream(engine).held():
            run = pool.submit(engine.run, {"x": x}, ["y"], {})
            wait_until(lambda: engine._instances[0]._context.enqueued > 0)  # type: ignore[union-attr]
            x[:] = 7
        assert (run.result()["y"] == 2).all()


@pytest.mark.parametrize("count", [3, 100_000], ids=["small", "large"])
def test_results_never_share_memory_with_inputs(
    write_model: WriteModel, load_model: Load, count: int
) -> None:
    engine = load_model(
        write_model(
            [Node("Identity", ["x"], ["same"]), Node("Add", ["x", "zero"], ["added"])],
            {"x": (FLOAT, ["n"])},
            {"same": (FLOAT, ["n"]), "added": (FLOAT, ["n"])},
            {"zero": np.array(0, np.float32)},
        )
    )
    x = np.arange(count, dtype=np.float32)
    for into in ({}, {"same": np.zeros_like(x)}):
        for result in engine.run({"x": x}, ["same", "added"], into).values():
            assert result.tolist() == x.tolist()
            assert not np.shares_memory(result, x)


# Memory


def test_a_request_takes_no_device_memory(
    double: Path, device: TwinDevice, load_model: Load
) -> None:
    engine = load_model(double)
    free = device.memory().free_bytes
    for count in (1, 1000, 100_000):
        engine.run({"x": np.ones(count, np.float32)}, ["y"], {})
    assert device.memory().free_bytes == free


def test_a_model_that_does_not_fit_is_refused_with_figures(
    double: Path, inspector: Inspector
) -> None:
    device = TwinDevice(replace(TWIN_FACTS, memory_bytes=1_000_000))
    with pytest.raises(ModelFileError) as caught:
        twin_engine(double, device, inspector, elements_max=100_000)
    assert str(caught.value) == (
        f"the model does not fit on {TWIN_FACTS.uuid}: 1000000 bytes are free, the largest "
        "inputs alone take 800000 in 1 instances of 2 overlapped runs each"
    )
    device.close()


@pytest.mark.parametrize(
    ("call", "count"), [("cuStreamCreate", 3), ("cuEventCreate", 7), ("cuMemAlloc", 5)]
)
def test_a_model_that_does_not_fit_leaves_nothing(
    double: Path, inspector: Inspector, monkeypatch: pytest.MonkeyPatch, call: str, count: int
) -> None:
    """Whichever call is the one for which there is no room."""
    for nth in range(count):
        device, calls = TwinDevice(), list[str]()
        monkeypatch.setattr(device, "enter", failing(device, call, nth, calls))
        with pytest.raises(ModelFileError, match="does not fit"):
            twin_engine(double, device, inspector, activation_bytes=64)
        assert calls.count("cuEventCreate") == calls.count("cuEventDestroy")
        device.close()  # says what else was left


def failing(device: TwinDevice, call: str, nth: int, calls: list[str]) -> Callable[[str], None]:
    """TwinDevice.enter, which notes in `calls` what went well. There is no room for the nth."""
    enter = device.enter

    def noting(name: str) -> None:
        if name == call and calls.count(call) == nth:
            device.fail_next(call, "CUDA_ERROR_OUT_OF_MEMORY")
        enter(name)
        calls.append(name)

    return noting


def test_without_room_for_staging_it_copies_directly(double: Path, load_model: Load) -> None:
    engine = load_model(double, staging_bytes_max=8192)
    for count, refused in ((10, 0), (100_000, 2)):
        x = np.arange(count, dtype=np.float32)
        assert engine.run({"x": x}, ["y"], {})["y"].tolist() == (2 * x).tolist()
        assert engine.staging_figures.refused == refused
