# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-subclassing-any=False
"""Proofs whose reference is PyTorch: what it runs itself is compared with the program as it is."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.compilations import GIB
from thirdrail_engines import Engine, EngineOptions, LoadedEngine, load
from thirdrail_engines.builds import BuildLimits
from thirdrail_engines.compile_options import read_compile_options
from thirdrail_engines.compiling import CompileServices
from thirdrail_engines.expectations import Reference, ReferenceRequest
from thirdrail_engines.plan_cache import PlanCache
from thirdrail_engines.proof_apart import prove_apart
from thirdrail_engines.proving import ProofError
from thirdrail_engines.reference_proof import Tolerance

pytestmark = [pytest.mark.needs_torch, pytest.mark.slow, pytest.mark.timeout(300)]

SaveModel = Callable[..., Path]
COMPILED = {"engine": "torch", "torch_compile": "aot_inductor"}
WEIGHT = np.full(16, 0.75, np.float32)


@pytest.fixture
def special(save_exported: SaveModel) -> Path:
    """ONNX has no word for it, and it takes at most 12 rows: fewer than are tried first."""
    import torch

    class Special(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.from_numpy(WEIGHT.copy()))

        def forward(self, x: Any) -> Any:
            return torch.special.bessel_j0(x * self.weight)

    path = save_exported(Special(), (torch.ones(3, 16),))
    rows = torch.export.Dim("rows", min=1, max=12)
    program = torch.export.export(Special(), (torch.ones(3, 16),), dynamic_shapes=({0: rows},))
    torch.export.save(program, path)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[PlanCache]:
    with PlanCache(tmp_path / "cache", GIB) as made:
        yield made


@pytest.fixture
def load_special(special: Path, cache: PlanCache) -> Iterator[Callable[..., LoadedEngine]]:
    """load_special(**parameters): closed after the test."""
    loaded: list[LoadedEngine] = []
    services = CompileServices(cache, BuildLimits(niceness=0))

    def load_one(**parameters: str) -> LoadedEngine:
        wanted = read_compile_options({**COMPILED, **parameters})
        loaded.append(load(special, options=EngineOptions(), compile=wanted, services=services))
        return loaded[-1]

    yield load_one
    for each in loaded:
        each.engine.close()


def eager(path: Path) -> Engine:
    from thirdrail_engines.torch_engine import load_torch

    return load_torch(path, options=EngineOptions())


def proof_of(engine: Engine, source: Path) -> Any:
    services = CompileServices(limits=BuildLimits(niceness=0))
    return prove_apart(engine, ReferenceRequest(source, None, ()), None, Tolerance(0), services)


def test_a_program_is_its_own_reference(special: Path, tmp_path: Path) -> None:
    import torch

    from support.torch_modules import save_exported

    proof = proof_of(eager(special), special)
    assert proof.is_proven
    # 32 and 64 rows are more than it takes.
    assert proof.runs == ("trial sizes", "trial sizes, one row")
    assert proof.outputs[0].compared == (8 + 1) * 16

    class Other(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.special.bessel_j0(x)

    (tmp_path / "other").mkdir()
    other = save_exported(tmp_path / "other/model.pt2", Other(), (torch.ones(3, 16),), ({0: "n"},))
    assert "output 'output' has max_abs" in proof_of(eager(other), special).faults[0]


def test_a_reference_that_cannot_be_read_proves_nothing(special: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt2"
    broken.write_bytes(special.read_bytes()[:-100])
    (fault,) = proof_of(eager(special), broken).faults
    assert fault.startswith("there is no reference to compare with: broken.pt2: cut short")


@pytest.mark.needs_gcc
def test_what_onnx_has_no_word_for_is_compiled_and_proven(
    load_special: Callable[..., LoadedEngine], special: Path
) -> None:
    loaded = load_special()
    report = loaded.report
    assert (report.engine, report.attempts) == ("torch aot_inductor", ())
    assert report.proof is not None
    assert report.proof.reference is Reference.TORCH
    assert report.proof.runs == ("trial sizes", "trial sizes, one row")
    again = load_special()
    assert (again.report.is_cache_hit, again.report.proof) == (True, report.proof)
    x = np.random.default_rng(0).standard_normal((12, 16), dtype=np.float32)
    expected = eager(special).run({"x": x}, ["output"], {})["output"]
    np.testing.assert_allclose(
        loaded.engine.run({"x": x}, ["output"], {})["output"], expected, atol=1e-6
    )
    # By another reference it is proven anew; that one needs the ONNX form.
    other = load_special(proof_reference="onnxruntime")
    assert other.report.engine == "torch"
    assert other.report.attempts[0].fault == "refused"
    assert "bessel_j0" in other.report.attempts[0].reason


@pytest.mark.needs_gcc
def test_a_damaged_library_is_caught(
    load_special: Callable[..., LoadedEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of sixteen, in code that runs."""
    from thirdrail_engines import torch_package

    load_package = torch_package.load_package

    def load_damaged(data: memoryview, name: str, **more: Any) -> Any:
        return load_package(damaged(data, tmp_path), name, **more)

    monkeypatch.setattr(torch_package, "load_package", load_damaged)
    loaded = load_special()
    assert loaded.report.engine == "torch"
    (attempt,) = loaded.report.attempts
    assert (attempt.engine, attempt.fault) == ("torch aot_inductor", "not proven")
    assert "output 'output' has max_rel" in attempt.reason
    with pytest.raises(ProofError, match="torch aot_inductor is not proven"):
        load_special(on_compile_failure="fail")


def damaged(data: memoryview, folder: Path) -> bytes:
    """The plan with another weight in its library."""
    from thirdrail_engines.torch_plan import read_plan, write_plan

    plan = read_plan("model.pt2", data)
    (folder / "whole").write_bytes(plan.package)
    other = WEIGHT.copy()
    other[3] = 1.5
    with (
        zipfile.ZipFile(folder / "whole") as whole,
        zipfile.ZipFile(folder / "changed", "w") as changed,
    ):
        for member in whole.namelist():
            content = whole.read(member)
            if member.endswith(".so"):
                assert content.count(WEIGHT.tobytes()) == 1
                content = content.replace(WEIGHT.tobytes(), other.tobytes())
            changed.writestr(member, content)
    target = folder / "damaged.plan"
    target.unlink(missing_ok=True)
    write_plan(target, folder / "changed", plan.inputs, plan.outputs, plan.sizes)
    return target.read_bytes()


def test_the_onnx_form_can_be_proven_against_the_program(
    save_exported: SaveModel, cache: PlanCache
) -> None:
    import torch

    from support.torch_modules import Tokens

    path = save_exported(Tokens(), (torch.randint(50, (2, 7)),), ({0: "batch"},))
    wanted = read_compile_options({"proof_reference": "torch", "proof.tokens": "0..49"})
    loaded = load(path, options=EngineOptions(), compile=wanted, services=CompileServices(cache))
    loaded.engine.close()
    assert loaded.report.engine == "onnxruntime plan"
    assert loaded.report.proof is not None
    assert loaded.report.proof.reference is Reference.TORCH
    assert 0 < loaded.report.proof.outputs[0].max_abs < 1e-4
