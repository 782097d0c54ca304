# SPDX-License-Identifier: Apache-2.0
"""What a hit of the plan cache costs: to read and verify a plan, beside the build that it saves."""

import hashlib
import importlib.util
import multiprocessing
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench import models
from bench.lane_load import timed
from bench.measure import Contender, Series, interleave
from bench.options import Options
from bench.report import Table
from thirdrail_engines.builds import BuildLimits, run_build
from thirdrail_engines.plan_cache import Manifest, PlanCache, PlanKey, key_of
from thirdrail_engines.plan_cache.reading import PIECE_BYTES, read_and_hash
from thirdrail_engines.plan_requests import onnxruntime_version
from thirdrail_engines.plans import Builder, PlanRequest

QUESTION = "reading and verifying a plan, which hash, and a hit beside the build"

MIB = 1 << 20
SIZES_MIB = (1, 16, 256)
HASHED_MIB = 256
SERVERS = 8
BUILD_S = 1.0
CACHE_BYTES = 4 << 30


def run(options: Options) -> Iterator[Table]:
    with PlanCache(options.folder / "plans", CACHE_BYTES) as cache:
        yield _hits(cache, options)
        yield _hashes(options)
        yield _builds(cache, options)
    yield _single_flight(options)


def _hits(cache: PlanCache, options: Options) -> Table:
    rows = []
    for size in SIZES_MIB:
        key = _store(cache, size)
        contenders = [
            Contender("get", timed(partial(_get, cache, key))),
            Contender("as is", timed(partial(_read_only, options, key))),
        ]
        got, read = interleave(contenders, options.seconds)
        figures = (_ms(got), _rate(got, size), _cpu_rate(got, size), _ms(read), _rate(read, size))
        rows.append((f"{size} MiB", *figures))
    return Table(
        "a hit",
        "PlanCache.get: read, verified by SHA-256, in private memory; from the page cache. Beside "
        "it the file read into a bytes object and not verified. Target: at least 1 GB/s.",
        ("plan", "p50 / p99 ms", "GB/s", "GB per CPU second", "only read, ms", "GB/s"),
        rows,
    )


def _store(cache: PlanCache, size_mib: int) -> PlanKey:
    key = PlanKey(hashlib.sha256(b"%d" % size_mib).hexdigest(), {})
    with cache.workspace() as work:
        (work / "plan").write_bytes(os.urandom(size_mib * MIB))
        cache.put(key, work / "plan", Manifest())
    return key


def _get(cache: PlanCache, key: PlanKey) -> None:
    assert cache.get(key) is not None
    cache.release(key)


def _read_only(options: Options, key: PlanKey) -> None:
    (options.folder / "plans/plans" / key.digest / "plan").read_bytes()


def _hashes(options: Options) -> Table:
    """Each over memory that lies there, in the pieces in which a plan is read."""
    data = memoryview(np.random.default_rng(1).bytes(HASHED_MIB * MIB))
    path = options.folder / "hashed"
    path.write_bytes(data)
    contenders = [Contender(name, timed(_over(data, new))) for name, new in _known_hashes().items()]
    with path.open("rb") as file:
        contenders.append(
            Contender(
                "read and sha256, as a hit does",
                timed(lambda: read_and_hash(file.fileno(), len(data))),
            )
        )
        series = interleave(contenders, options.seconds)
    path.unlink()
    return Table(
        f"hashes over {HASHED_MIB} MiB",
        f"Pieces of {PIECE_BYTES >> 20} MiB, one thread; the last line has a second one that "
        "reads. xxhash and blake3 where they are installed; Thirdrail does not need them.",
        ("", "p50 / p99 ms", "GB/s", "GB per CPU second"),
        [
            (each.name, _ms(each), _rate(each, HASHED_MIB), _cpu_rate(each, HASHED_MIB))
            for each in series
        ],
        [f"SHA instructions: {'yes' if _has_sha_instructions() else 'no'}"],
    )


def _known_hashes() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        "sha256": hashlib.sha256,
        "sha512": hashlib.sha512,
        "blake2b": hashlib.blake2b,
        "crc32": _Crc32,
    }
    for module, name in (("xxhash", "xxh3_128"), ("blake3", "blake3")):
        if importlib.util.find_spec(module) is not None:
            found[name] = getattr(importlib.import_module(module), name)
    return found


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview) -> None:
        self._value = zlib.crc32(data, self._value)


def _over(data: memoryview, new: Callable[[], Any]) -> Callable[[], None]:
    def hash_all() -> None:
        digest = new()
        for at in range(0, len(data), PIECE_BYTES):
            digest.update(data[at : at + PIECE_BYTES])

    return hash_all


def _has_sha_instructions() -> bool:
    return "sha_ni" in Path("/proc/cpuinfo").read_text()


def _builds(cache: PlanCache, options: Options) -> Table:
    source = models.write_mlp(options.folder / "models")
    request = PlanRequest(source, Builder.ONNXRUNTIME, onnxruntime_version(), target="this machine")
    key = key_of(request)
    with cache.workspace() as work:
        began = time.perf_counter()
        built = run_build(request, work, BuildLimits(), lambda *_: None, threading.Event())
        build_s = time.perf_counter() - began
        cache.put(key, built.plan, Manifest())
    hits = interleave(
        [Contender("hit", timed(lambda: _get(cache, key_of(request))))], options.seconds
    )
    hit_s = hits[0].percentile_us(50) / 1e6
    size = source.stat().st_size / MIB
    return Table(
        "a hit beside the build",
        f"An MLP of {size:.0f} MiB, ONNX Runtime's optimised model, the cheapest of all plans. The "
        "build: one, in its process, with that process's start. The hit: the key from the source's "
        "content, then the plan; without loading it. Target: at most 10 % of the build.",
        ("build s", "hit ms", "hit to build"),
        [(f"{build_s:.2f}", f"{hit_s * 1e3:.1f}", f"{hit_s / build_s:.1%}")],
    )


def _single_flight(options: Options) -> Table:
    """SERVERS processes ask for the same plan at once; whoever builds takes BUILD_S."""
    context = multiprocessing.get_context("spawn")
    folder = options.folder / "shared"
    pipes, processes = [], []
    for _ in range(SERVERS):
        ours, theirs = context.Pipe()
        process = context.Process(target=_load_once, args=(theirs, folder), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    began = time.perf_counter()
    for pipe in pipes:
        pipe.send("go")
    builds = sum(pipe.recv() for pipe in pipes)
    elapsed = time.perf_counter() - began
    for process in processes:
        process.join()
    return Table(
        "servers that start together",
        f"{SERVERS} processes need the same plan of 16 MiB; a build takes {BUILD_S:.0f} s. "
        "Target: one build.",
        ("builds", "until all have it, s"),
        [(str(builds), f"{elapsed:.2f}")],
    )


def _load_once(pipe: Connection, folder: Path) -> None:
    key = PlanKey("0" * 64, {})
    with PlanCache(folder, CACHE_BYTES) as cache:
        pipe.send("ready")
        pipe.recv()
        has_built = False
        with cache.building(key, threading.Event(), lambda *_: None):
            if cache.get(key) is None:
                has_built = True
                time.sleep(BUILD_S)
                with cache.workspace() as work:
                    (work / "plan").write_bytes(bytes(16 * MIB))
                    cache.put(key, work / "plan", Manifest(build_s=BUILD_S))
    pipe.send(has_built)


def _ms(series: Series) -> str:
    return f"{series.percentile_us(50) / 1e3:.2f} / {series.percentile_us(99) / 1e3:.2f}"


def _rate(series: Series, size_mib: int) -> str:
    return f"{size_mib * MIB / series.percentile_us(50) / 1e3:.2f}"


def _cpu_rate(series: Series, size_mib: int) -> str:
    """What it would be with a core to itself; on a busy host the better figure."""
    return f"{size_mib * MIB / series.client_cpu_us / 1e3:.2f}"
