# SPDX-License-Identifier: Apache-2.0
"""Programs that are compiled to native code: the build, the engine on its plan, and falling back.

One program with inputs and outputs of several kinds is built once for all tests of the engine.
"""

import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thirdrail_engines import Engine, EngineOptions, load
from thirdrail_engines.builds import BuildLimits, run_build
from thirdrail_engines.compile_options import CompileOptions, EngineChoice, TorchCompile
from thirdrail_engines.compiling import CompileServices
from thirdrail_engines.engine import EngineError, ModelFileError
from thirdrail_engines.plan_cache import PlanCache
from thirdrail_engines.plan_requests import aot_inductor_request
from thirdrail_engines.plans import BuildError, BuildFault, Precision

pytestmark = [pytest.mark.needs_torch, pytest.mark.timeout(300)]

COMPILED = CompileOptions(engine=EngineChoice.TORCH, torch_compile=TorchCompile.AOT_INDUCTOR)
NAMES = ["classes", "moved", "same", "no", "weight"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The engine, its report, the same program operator by operator, and the plan's file."""
    import torch

    from support.torch_modules import ManyKinds, save_exported
    from thirdrail_engines.torch_engine import load_torch

    folder = tmp_path_factory.mktemp("compiled")
    rows = {0: "rows"}
    examples = (torch.ones(2, 3, 16, 16), torch.ones(2, 4, dtype=torch.int32), torch.ones(2) > 0)
    path = save_exported(folder / "model.pt2", ManyKinds(), examples, (rows, rows, rows))
    with PlanCache(folder / "cache", 1 << 30) as cache:
        services = CompileServices(cache=cache, limits=BuildLimits(niceness=0))
        made = load(path, options=EngineOptions(2), compile=COMPILED, services=services)
        again = load(path, options=EngineOptions(), compile=COMPILED, services=services)
    again.engine.close()
    eager = load_torch(path, options=EngineOptions())
    plan = folder / "cache/plans" / again.report.plan_key / "plan"
    yield made, again.report, eager, plan
    made.engine.close()
    eager.close()


def inputs_of(rows: int) -> dict[str, Any]:
    random = np.random.default_rng(rows)
    return {
        "image": random.standard_normal((rows, 3, 16, 16), dtype=np.float32),
        "counts": random.integers(-5, 5, (rows, 4), dtype=np.int32),
        "flags": random.integers(0, 2, rows).astype(bool),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.needs_gcc
def test_a_program_is_compiled_proven_and_found_again(loaded: Any) -> None:
    made, again, _, _ = loaded
    report = made.report
    assert (report.engine, report.attempts) == ("torch aot_inductor", ())
    assert report.proof is not None
    assert report.proof.is_proven
    assert (report.is_cache_hit, again.is_cache_hit) == (False, True)
    assert again.plan_key == report.plan_key
    assert again.proof == report.proof


@pytest.mark.slow
@pytest.mark.needs_gcc
@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_compiled_and_eager_agree(loaded: Any, rows: int) -> None:
    made, _, eager, _ = loaded
    assert made.engine.spec == eager.spec
    inputs = inputs_of(rows)
    assert_same(made.engine.run(inputs, NAMES, {}), eager.run(inputs, NAMES, {}))


@pytest.mark.slow
@pytest.mark.needs_gcc
def test_results_are_nobody_elses_memory(loaded: Any) -> None:
    made, _, eager, _ = loaded
    inputs = inputs_of(4)
    for array in inputs.values():
        array.flags.writeable = False
    expected = eager.run(inputs, NAMES, {})
    results = made.engine.run(inputs, NAMES, {})
    assert not any(
        np.shares_memory(result, array) for result in results.values() for array in inputs.values()
    )
    for result in results.values():
        result[...] = 0
    assert_same(made.engine.run(inputs, NAMES, {}), expected)


@pytest.mark.slow
@pytest.mark.needs_gcc
def test_results_come_in_the_callers_array_and_only_those_wanted(loaded: Any) -> None:
    made, _, eager, _ = loaded
    inputs = inputs_of(4)
    into = {"same": np.full((4, 4), 77, np.int32), "moved": np.zeros((4, 4), np.int32)}
    results = made.engine.run(inputs, ["same", "moved"], into)
    assert_same(results, eager.run(inputs, ["same", "moved"], {}))
    assert results["same"] is into["same"]
    assert made.engine.run(inputs, [], {}) == {}


@pytest.mark.slow
@pytest.mark.needs_gcc
def test_inputs_with_gaps_and_odd_booleans_are_read_right(loaded: Any) -> None:
    made, _, eager, _ = loaded
    inputs = inputs_of(4)
    inputs["counts"] = np.asfortranarray(inputs["counts"])
    inputs["flags"] = np.array([0, 255, 2, 1], np.uint8).view(bool)
    assert_same(made.engine.run(inputs, NAMES, {}), eager.run(inputs, NAMES, {}))


# In a process of its own: the first library with a symbol that is unique keeps it for the others.
CYCLES = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from thirdrail_engines import EngineOptions
from thirdrail_engines.torch_package import load_package

def mapped():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[5] for line in lines if "/thirdrail-package-" in line})

plan = Path(sys.argv[1]).read_bytes()
inputs = {
    "image": np.ones((3, 3, 16, 16), np.float32),
    "counts": np.ones((3, 4), np.int32),
    "flags": np.ones(3, bool),
}
with ThreadPoolExecutor(1) as thread:
    for _ in range(3):
        engine = load_package(plan, "model.pt2", options=EngineOptions())
        names = [tensor.name for tensor in engine.spec.outputs]
        there = thread.submit(engine.run, inputs, names, {}).result()
        here = engine.run(inputs, names, {})
        print(mapped(), end=" ")
        engine.close()
        print(mapped(), all((here[name] == there[name]).all() for name in names))
"""


@pytest.mark.slow
@pytest.mark.needs_gcc
def test_a_closed_engine_leaves_no_library_and_its_results_stay(loaded: Any) -> None:
    """Also not of one that was run by a thread which goes on."""
    done = subprocess.run(
        [sys.executable, "-c", CYCLES, str(loaded[3])],
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1 0 True\n" * 3, done.stderr


@pytest.mark.slow
@pytest.mark.needs_gcc
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"flags": np.ones(3, bool)}, "dimension 0 of input 'flags' is 3, and dimension 0 of"),
        ({"counts": np.ones((2, 5), np.int32)}, r"shape \[2, 5\], expected INT32 with \[-1, 4\]"),
        ({"counts": np.ones((2, 4), np.int64)}, "expected INT32"),
        ({"more": np.ones(2)}, "'more' is no input"),
    ],
)
def test_what_was_not_compiled_is_refused(
    loaded: Any, change: dict[str, Any], expected: str
) -> None:
    with pytest.raises(EngineError, match=expected):
        loaded[0].engine.run({**inputs_of(2), **change}, NAMES, {})
    no_rows = {name: array[:0] for name, array in inputs_of(2).items()}
    with pytest.raises(EngineError, match="dimension 0 of input 'image' is 0, the model takes 1"):
        loaded[0].engine.run(no_rows, NAMES, {})


@pytest.mark.slow
@pytest.mark.needs_gcc
def test_threads_share_one_engine(loaded: Any) -> None:
    made, _, eager, _ = loaded

    def run(engine: Engine, rows: int) -> dict[str, Any]:
        return engine.run(inputs_of(rows), NAMES, {})

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda rows: run(made.engine, rows), [1, 2, 5, 8] * 5))
    for rows, result in zip([1, 2, 5, 8] * 5, results, strict=True):
        assert_same(result, run(eager, rows))


def test_operators_that_a_library_does_not_reach_are_refused(tmp_path: Path) -> None:
    from thirdrail_engines.builders.aot_inductor_builder import check_package

    package = tmp_path / "package.pt2"
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("p/model.wrapper.so", b"")
        archive.writestr("p/model.wrapper_metadata.json", b'{"AOTI_DEVICE_KEY": "cpu"}')
    check_package(tmp_path / "model.pt2", package)
    with zipfile.ZipFile(package, "a") as archive:
        archive.writestr("p/model.json", b'{"nodes": [{"name": "buf0"}]}')
    with pytest.raises(BuildError, match="leaves some of its operators to PyTorch") as caught:
        check_package(tmp_path / "model.pt2", package)
    assert caught.value.fault is BuildFault.REFUSED


@pytest.fixture
def special(tmp_path: Path) -> Path:
    """ONNX has no word for it."""
    import torch

    from support.torch_modules import Special, save_exported

    return save_exported(tmp_path / "model.pt2", Special(), (torch.ones(3),))


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all programs that are found."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_it_falls_back_to_eager_and_says_so(special: Path) -> None:
    made = load(special, options=EngineOptions(), compile=COMPILED)
    made.engine.close()
    assert made.report.engine == "torch"
    (attempt,) = made.report.attempts
    assert (attempt.engine, attempt.fault) == ("torch aot_inductor", "missing")
    assert attempt.reason == (
        "AOTInductor needs a C++ compiler, and there is no g++: install one, as in: apt install g++"
    )


def test_a_compiler_that_does_not_work_is_missing_too(special: Path, no_compiler: Path) -> None:
    fake = no_compiler / "g++"
    fake.write_text("#!/bin/sh\necho 'cannot execute cc1plus' >&2\nexit 1\n")
    fake.chmod(0o755)
    folder = special.parent / "build"
    folder.mkdir()
    request = aot_inductor_request(special, COMPILED, None, threads_max=1)
    with pytest.raises(BuildError, match=r"does not compile C\+\+20 .*cannot execute") as caught:
        run_build(request, folder, BuildLimits(), lambda *_: None, threading.Event())
    assert caught.value.fault is BuildFault.MISSING


@pytest.mark.needs_gcc
def test_where_nothing_may_be_executed_a_build_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thirdrail_engines.builders.cpp_compiler import compiler_in

    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    with pytest.raises(BuildError, match=f"no program can be run in {tmp_path.parent}") as caught:
        compiler_in(tmp_path)
    assert caught.value.fault is BuildFault.MISSING


def test_a_folder_of_several_words_is_refused(tmp_path: Path) -> None:
    """PyTorch does not quote it in its commands."""
    from thirdrail_engines.builders.cpp_compiler import compiler_in

    with pytest.raises(BuildError, match=r"does not compile in .*two words: give") as caught:
        compiler_in(tmp_path / "two words" / "build")
    assert caught.value.fault is BuildFault.REFUSED


def test_a_precision_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    wanted = CompileOptions(torch_compile=TorchCompile.AOT_INDUCTOR, precision=Precision.FP16)
    with pytest.raises(BuildError, match="in the precision in which it was exported") as caught:
        aot_inductor_request(tmp_path / "model.pt2", wanted, None, threads_max=1)
    assert caught.value.fault is BuildFault.REFUSED


def test_a_damaged_package_is_an_error_of_the_file(tmp_path: Path) -> None:
    from thirdrail_engines.torch_package import load_package
    from thirdrail_engines.torch_plan import Sizes, write_plan

    (tmp_path / "package").write_bytes(b"no library")
    write_plan(tmp_path / "plan", tmp_path / "package", [], [], Sizes({}, {}))
    with pytest.raises(ModelFileError, match="cannot load what it compiled"):
        load_package((tmp_path / "plan").read_bytes(), "model.pt2", options=EngineOptions())
