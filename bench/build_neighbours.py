# SPDX-License-Identifier: Apache-2.0
"""What small calls of one model suffer while another is compiled in the same server.

Builds keep a core busy wherever they run. So the calls are also measured beside the same builds by
a process that has nothing to do with the server, and beside a process that only burns a core: what
they suffer there is the machine's doing. A load goes on in the worker when its build is done; those
calls are a line of their own.
"""

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from bench import models, servers
from bench.batching import MAGIKA_FOLDER as DEMO_FOLDER
from bench.measure import Contender, Series, Slice, as_latencies, interleave, ratio
from bench.options import Options
from bench.report import Table
from thirdrail import Client, LoadProgress
from thirdrail_engines.builds import BuildLimits, run_build
from thirdrail_engines.compile_options import CompileOptions
from thirdrail_engines.plan_requests import onnxruntime_request
from thirdrail_engines.plans import Precision

SMALL_BYTES = 64
COMPILED = "ocr_recognition"
CONFIG = 'parameters { key: "keep_optimised" value { string_value: "true" } }\n'
BURN_S = 1.0
LOOK_CALLS = 8  # between two looks whether the other process is done
ALONE = "alone"
OPENING = "loading the engine"  # the phase of a load that follows its build


def run(options: Options) -> Table:
    repository, cache = options.folder / "neighbours", options.folder / "neighbours-cache"
    models.write_identity(repository)
    source = write_compiled(repository)
    arguments = ["--model-control=explicit", "--load-model=identity", f"--cache-dir={cache}"]
    with (
        servers.thirdrail(repository, options.folder, arguments) as server,
        Client(server.unix, transport="lane") as client,
        _Beside(partial(_load, server.unix, cache)) as loads,
        _Beside(partial(_build, source)) as builds,
        _Beside(_burn) as burning,
    ):
        x = models.floats(SMALL_BYTES)

        def call() -> None:
            client.infer("identity", {"x": x})

        contenders = [
            Contender(ALONE, lambda seconds: _calls(call, _after(seconds))),
            Contender("while another model is built", loads.calls(call)),
            Contender("beside the same builds by another process", builds.calls(call)),
            Contender("beside a process that burns a core", burning.calls(call)),
        ]
        series = interleave(contenders, options.seconds)
    alone, beside, builds_alone, burnt = series
    opened = Series("while its plan is read, opened and proven", loads.slices_after[1:])
    return Table(
        "small calls while another model is built",
        f"{SMALL_BYTES} B calls of identity by lane, one at a time, from this process. "
        f"{COMPILED} is loaded over and over by another one, from an empty cache: built by ONNX "
        "Runtime in a process of the lowest priority, then read, opened and proven in the worker. "
        f"The burnt core: {BURN_S:g} s of a busy loop with the priority of builds. "
        "Target: p99 during the build at most 1.5 times that alone.",
        ("calls", "p50 us", "p99 us", "p99.9 us", "calls/s", "each lasts, s"),
        [_row(each) for each in (alone, beside, builds_alone, burnt, opened)],
        [
            _ratios(beside, alone, "alone"),
            _ratios(beside, builds_alone, "beside the same builds"),
            _ratios(beside, burnt, "beside a burnt core"),
        ],
    )


def write_compiled(repository: Path) -> Path:
    """A model for which a plan is built when it is loaded. Returns its file."""
    path = repository / COMPILED / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    shutil.copy(DEMO_FOLDER / COMPILED / "1" / "model.onnx", path)
    (repository / COMPILED / "config.pbtxt").write_text(CONFIG)
    return path


class _Beside:
    """A process that does something whole, once for each time it is asked.

    action: returns the time of perf_counter at which what counts of it was over.
    slices_after: calls from then to the action's end.
    """

    def __init__(self, action: Callable[[], float]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_repeat, args=(theirs, action))
        self._process.start()
        theirs.close()
        self.slices_after: list[Slice] = []

    def __enter__(self) -> "_Beside":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def calls(self, call: Callable[[], None]) -> Callable[[float], Slice]:
        """Slices of calls from the start of the action to its end, however long that takes."""

        def run_slice(_: float) -> Slice:
            self._pipe.send("go")
            began_s = time.perf_counter()
            done = _calls(call, self._pipe.poll)
            during, after = _split(done, self._pipe.recv() - began_s)
            self.slices_after.append(after)
            return during

        return run_slice


def _split(done: Slice, at_s: float) -> tuple[Slice, Slice]:
    """Calls one after the other: those that had ended by then, and the others."""
    at = int(np.searchsorted(np.cumsum(done.latencies_us), at_s * 1e6))
    first, last = done.latencies_us[:at], done.latencies_us[at:]
    return Slice(first, at_s, 0.0), Slice(last, done.elapsed_s - at_s, 0.0)


def _calls(call: Callable[[], None], is_over: Callable[[], bool]) -> Slice:
    latencies: list[int] = []
    cpu_s, started = time.process_time(), time.perf_counter()
    while not latencies or not is_over():
        for _ in range(LOOK_CALLS):
            began = time.perf_counter_ns()
            call()
            latencies.append(time.perf_counter_ns() - began)
    elapsed = time.perf_counter() - started
    return Slice(as_latencies(latencies), elapsed, time.process_time() - cpu_s)


def _after(seconds: float) -> Callable[[], bool]:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


def _row(series: Series) -> tuple[str, ...]:
    turn_s = sum(each.elapsed_s for each in series.slices) / len(series.slices)
    return (
        series.name,
        f"{series.percentile_us(50):.0f}",
        f"{series.percentile_us(99):.0f}",
        f"{series.percentile_us(99.9):.0f}",
        f"{series.calls_per_s:.0f}",
        "" if series.name == ALONE else f"{turn_s:.2f}",
    )


def _ratios(of: Series, to: Series, what: str) -> str:
    p99 = ratio(of, to, lambda each: each.p99_us)
    p50 = ratio(of, to, lambda each: each.p50_us)
    together = of.percentile_us(99) / to.percentile_us(99)
    return (
        f"to {what}: p99 {p99.text(1)} by round, {together:.1f} over all calls; p50 {p50.text(1)}"
    )


# In the processes beside. perf_counter is the same clock in all of them.


def _repeat(pipe: Connection, action: Callable[[], float]) -> None:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.recv()
            pipe.send(action())


def _load(address: str, cache: Path) -> float:
    """One whole load of the model that has to be built for it. When its build was done."""
    phases: dict[str, float] = {}

    def note(progress: LoadProgress) -> None:
        phases.setdefault(progress.phase, time.perf_counter())

    with Client(address, transport="grpc") as client:
        client.load(COMPILED, progress=note)
        assert not client.describe(COMPILED).engine_report.is_cache_hit
        client.unload(COMPILED)
    for plan in (cache / "plans").iterdir():
        shutil.rmtree(plan)
    return phases[OPENING]


def _build(source: Path) -> float:
    """The build of such a load, without a server."""
    request = onnxruntime_request(
        source, CompileOptions(), precision=Precision.AS_IS, threads_max=os.cpu_count() or 1
    )
    with tempfile.TemporaryDirectory(dir=source.parents[2]) as folder:
        run_build(request, Path(folder), BuildLimits(), lambda *_: None, threading.Event())
    return time.perf_counter()


def _burn() -> float:
    """With the priority of builds, which this process keeps."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    end = time.perf_counter() + BURN_S
    while time.perf_counter() < end:
        pass
    return end
