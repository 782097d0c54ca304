# SPDX-License-Identifier: Apache-2.0
"""From a model file to an engine: which one runs it."""

from pathlib import Path

from compiling.conftest import LOADING, PLAN, PROVING, LoadModel, results
from support.compilations import BUILD_PHASES, Services
from thirdrail_engines.plan_cache import PlanCache


def test_a_small_model_is_read_as_it_is(
    load_model: LoadModel, cache: PlanCache, model: Path
) -> None:
    services = Services(cache)
    loaded = load_model(model, {}, services)
    assert loaded.report.to_dict() == {
        "engine": "onnxruntime",
        "why_not_first": "",
        "attempts": [],
        "precision": "as_is",
        "plan_key": "",
        "is_cache_hit": False,
        "build_s": 0.0,
        "proof": None,
    }
    assert services.phases == []


def test_a_plan_is_built_proven_and_found_again(
    load_model: LoadModel, cache: PlanCache, model: Path
) -> None:
    first, second = Services(cache), Services(cache)
    built = load_model(model, PLAN, first)
    found = load_model(model, PLAN, second)
    assert first.phases == [*BUILD_PHASES, LOADING, PROVING]
    assert second.phases == [LOADING]  # the proof is on record
    assert (built.report.engine, built.report.attempts) == ("onnxruntime plan", ())
    assert (built.report.is_cache_hit, found.report.is_cache_hit) == (False, True)
    assert built.report.build_s == found.report.build_s > 0
    assert built.report.plan_key == found.report.plan_key
    assert built.report.proof == found.report.proof
    assert built.report.proof is not None
    assert built.report.proof.runs == ("trial sizes", "trial sizes, one row")
    assert results(built) == results(found) == results(load_model(model, {}))


def test_a_proof_uses_the_shapes_of_profiles(load_model: LoadModel, model: Path) -> None:
    proof = load_model(model, {**PLAN, "profile.0.x": "1x16,2x16,4x16"}).report.proof
    assert proof is not None
    assert proof.runs == ("profile 0 best", "profile 0 smallest", "profile 0 largest")
    assert proof.outputs[0].compared == (1 + 2 + 4) * 8


def test_another_precision_is_another_plan_with_other_figures(
    load_model: LoadModel, model: Path
) -> None:
    loaded = load_model(model, {"precision": "fp16"})
    assert loaded.report.engine == "onnxruntime plan"
    assert loaded.report.proof is not None
    assert 0 < loaded.report.proof.outputs[0].max_rel < 5e-2
