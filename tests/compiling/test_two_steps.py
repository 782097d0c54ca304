# SPDX-License-Identifier: Apache-2.0
"""Loads that answer with one engine while a better one is built."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compiling.conftest import LOADING, PLAN, PROVING, results
from support.compilations import BUILD_PHASES, Services
from thirdrail_engines import EngineOptions, Inspector
from thirdrail_engines.compile_options import read_compile_options
from thirdrail_engines.load import BegunLoad, NoEngine, begin_load, stays
from thirdrail_engines.plan_cache import PlanCache
from thirdrail_engines.plans import BuildError, BuildFault

SERVE = {**PLAN, "serve_while_compiling": "true"}


@pytest.fixture
def begin(inspector: Inspector, cache: PlanCache) -> Iterator[Callable[..., BegunLoad]]:
    begun: list[BegunLoad] = []

    def begin_one(
        path: Path, parameters: dict[str, str], services: Services | None = None
    ) -> BegunLoad:
        begun.append(
            begin_load(
                path,
                options=EngineOptions(),
                inspector=inspector,
                compile=read_compile_options(parameters),
                services=(services or Services(cache)).given,
            )
        )
        return begun[-1]

    yield begin_one
    for each in begun:
        each.now.engine.close()


Begin = Callable[..., BegunLoad]


def test_one_engine_answers_while_the_other_is_compiled(
    begin: Begin, cache: PlanCache, model: Path
) -> None:
    services = Services(cache)
    begun = begin(model, SERVE, services)
    assert services.phases == []
    assert begun.now.report.engine == "onnxruntime"
    assert begun.now.report.why_not_first == (
        "onnxruntime plan: compiling: its plan is being built and proven"
    )
    before = results(begun.now)
    assert begun.later is not None
    final = begun.later()
    assert services.phases == [*BUILD_PHASES, LOADING, PROVING]
    assert (final.report.engine, final.report.attempts) == ("onnxruntime plan", ())
    assert results(final) == before == results(begun.now)
    final.engine.close()


def test_nothing_is_to_come_when_the_plan_is_there(
    begin: Begin, cache: PlanCache, model: Path
) -> None:
    first = begin(model, SERVE).later
    assert first is not None
    first().engine.close()
    services = Services(cache)
    begun = begin(model, SERVE, services)
    assert begun.later is None
    assert begun.now.report.engine == "onnxruntime plan"
    assert services.phases == [LOADING]


@pytest.mark.slow
def test_a_damaged_plan_is_built_anew_while_another_engine_answers(
    begin: Begin, model: Path, tmp_path: Path
) -> None:
    first = begin(model, SERVE).later
    assert first is not None
    first().engine.close()
    (plan,) = (tmp_path / "cache/plans").glob("*/plan")
    plan.write_bytes(b"x" + plan.read_bytes()[1:])
    begun = begin(model, SERVE)
    assert begun.now.report.engine == "onnxruntime"
    assert begun.later is not None
    final = begun.later()
    assert final.report.engine == "onnxruntime plan"
    final.engine.close()


def test_the_stopgap_says_all_that_keeps_the_first_engine_away(begin: Begin, model: Path) -> None:
    """The first cannot be had, and the second has to be built."""
    begun = begin(model, {**SERVE, "engine": "tensorrt_rtx"})
    attempts = begun.now.report.attempts
    assert [(each.engine, each.fault) for each in attempts] == [
        ("tensorrt_rtx on cuda", "missing"),
        ("onnxruntime plan", "compiling"),
    ]
    assert begun.later is not None
    final = begun.later()
    assert final.report.engine == "onnxruntime plan"
    assert [each.fault for each in final.report.attempts] == ["missing"]
    final.engine.close()


@pytest.mark.parametrize("parameters", [{}, PLAN, {"serve_while_compiling": "true"}], ids=str)
def test_one_step_is_enough_without_the_wish_or_without_a_build(
    begin: Begin, model: Path, parameters: dict[str, str]
) -> None:
    assert begin(model, parameters).later is None


def test_no_gpu_is_known_at_once(begin: Begin, model: Path) -> None:
    begun = begin(model, {**SERVE, "engine": "tensorrt_rtx", "keep_optimised": "false"})
    assert begun.later is None
    assert [each.fault for each in begun.now.report.attempts] == ["missing"]


@pytest.mark.slow
def test_an_engine_stays_when_the_other_is_not_proven(
    begin: Begin, cache: PlanCache, model: Path
) -> None:
    strict = {**SERVE, "precision": "fp16", "tolerance.max_abs": "1e-9"}
    begun = begin(model, strict)
    assert begun.later is not None
    with pytest.raises(NoEngine, match=": not proven: ") as caught:
        begun.later()
    report = stays(begun.now.report, caught.value)
    assert report.engine == "onnxruntime"
    assert [each.fault for each in report.attempts] == ["not proven"]
    assert "output 'y' has max_abs" in report.why_not_first


def test_a_compilation_on_the_side_can_be_cancelled(
    begin: Begin, cache: PlanCache, model: Path
) -> None:
    services = Services(cache, reading=lambda: services.cancelled.set())
    begun = begin(model, SERVE, services)
    assert begun.later is not None
    with pytest.raises(BuildError) as caught:
        begun.later()
    assert caught.value.fault is BuildFault.CANCELLED
    assert results(begun.now)
