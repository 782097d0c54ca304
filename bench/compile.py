# SPDX-License-Identifier: Apache-2.0
"""What compiling costs: a build, the hit that saves it, and what others suffer meanwhile."""

import importlib.util
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from bench import build_neighbours, start_together
from bench.batching import MAGIKA_FETCH
from bench.batching import MAGIKA_FOLDER as DEMO_FOLDER
from bench.lane_load import timed
from bench.measure import Series
from bench.options import Options
from bench.report import Table
from thirdrail_engines.builds import BuildLimits
from thirdrail_engines.compile_options import CompileOptions
from thirdrail_engines.compiling import CompileServices, compile_plan
from thirdrail_engines.inspector import Inspector
from thirdrail_engines.one_engine import EngineLoader
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.plan_cache import PlanCache, key_of
from thirdrail_engines.plans import Builder, PlanRequest
from thirdrail_engines.profiles import read_shape_range

QUESTION = (
    "real models: a cache hit beside the build, builds beside calls, servers starting at once"
)

MIB = 1 << 20
CACHE_BYTES = 4 << 30
BUILDS = 3
CAPABILITY = "sm86"
PROFILES = {
    "magika": {"bytes": read_shape_range("1x2048,8x2048,64x2048")},
    "ocr_detection": {"x": read_shape_range("1x3x320x320,1x3x960x960,1x3x1280x1280")},
    "ocr_recognition": {"x": read_shape_range("1x3x48x32,4x3x48x320,8x3x48x1280")},
}


def run(options: Options) -> Iterator[Table]:
    if not DEMO_FOLDER.is_dir():
        yield Table("compiling", f"Not measured: no {DEMO_FOLDER}; run {MAGIKA_FETCH}", ())
        return
    yield _hits(options)
    yield build_neighbours.run(options)
    yield start_together.run(options)


def _hits(options: Options) -> Table:
    with PlanCache(options.folder / "plans", CACHE_BYTES) as cache:
        rows = [
            _hit_row(
                _Case(model, _request(model, builder), options.folder / "plans", cache), options
            )
            for builder in _builders()
            for model in PROFILES
        ]
    return Table(
        "a hit of the plan cache beside the build",
        f"TensorRT for RTX for {CAPABILITY}, and ONNX Runtime's optimised model for this CPU. The "
        f"build: median of {BUILDS}, in its process, with that process's start, and saved. The "
        "hit: the key from the source's content, then the plan read, verified by SHA-256 and "
        "handed over, from the page cache; GB/s without the key. Deserialisation by the engine and "
        "the proof are excluded of both. Targets: at most 10 % of the build, at least 1 GB/s.",
        ("model", "builder", "plan MiB", "build s", "hit ms, p50 / p99", "GB/s", "hit to build"),
        rows,
    )


def _builders() -> Iterator[Builder]:
    yield Builder.ONNXRUNTIME
    if importlib.util.find_spec(Builder.TENSORRT_RTX) is not None:
        yield Builder.TENSORRT_RTX


def _request(model: str, builder: Builder) -> PlanRequest:
    path = DEMO_FOLDER / model / "1" / "model.onnx"
    wanted = CompileOptions(profiles=(PROFILES[model],))
    with (
        Inspector() as inspector,
        EngineLoader(path, EngineOptions(), inspector, wanted, None) as loader,
    ):
        return loader.request(builder, CAPABILITY)


class _Case:
    """A plan that is built and asked for."""

    def __init__(self, model: str, request: PlanRequest, folder: Path, cache: PlanCache) -> None:
        self.model = model
        self.request = request
        self.key = key_of(request)
        self.entry = folder / "plans" / self.key.digest
        self._cache = cache
        self._services = CompileServices(cache, BuildLimits(niceness=0))

    def build(self) -> float:
        """Into a cache that does not have it; the seconds that took."""
        shutil.rmtree(self.entry, ignore_errors=True)
        began = time.perf_counter()
        self._compile(is_hit_expected=False)
        return time.perf_counter() - began

    def hit(self) -> None:
        self._compile(is_hit_expected=True)

    def get(self) -> None:
        assert self._cache.get(self.key) is not None
        self._cache.release(self.key)

    def _compile(self, *, is_hit_expected: bool) -> None:
        plan, is_hit = compile_plan(self.request, self._services)
        assert is_hit is is_hit_expected
        self._cache.release(plan.key)


def _hit_row(case: _Case, options: Options) -> tuple[str, ...]:
    build_s = statistics.median(case.build() for _ in range(BUILDS))
    whole = Series("hit", [timed(case.hit)(options.seconds / 2)])
    got = Series("get", [timed(case.get)(options.seconds / 2)])
    plan_bytes = (case.entry / "plan").stat().st_size
    return (
        case.model,
        case.request.builder,
        f"{plan_bytes / MIB:.1f}",
        f"{build_s:.2f}",
        _ms(whole),
        f"{plan_bytes / got.percentile_us(50) / 1e3:.2f}",
        f"{whole.percentile_us(50) / 1e6 / build_s:.1%}",
    )


def _ms(series: Series) -> str:
    return f"{series.percentile_us(50) / 1e3:.1f} / {series.percentile_us(99) / 1e3:.1f}"
