# SPDX-License-Identifier: Apache-2.0
"""How much memory an idle server takes, and how soon after its start it is ready."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench import models, servers
from bench.batching import MAGIKA_FETCH
from bench.batching import MAGIKA_FOLDER as DEMO_FOLDER
from bench.options import Options
from bench.report import Table

QUESTION = "idle memory per process, and the time from start to ready"

STARTS = 5
SETTLE_S = 4.0  # the helpers of loading are gone, what they used is given back


def run(options: Options) -> Iterator[Table]:
    repository = options.folder / "models"
    models.write_identity(repository)
    repositories = {"one identity model": repository}
    if DEMO_FOLDER.is_dir():
        repositories["the demo's models"] = DEMO_FOLDER
    memory = [row for name, path in repositories.items() for row in _memory(name, path, options)]
    notes = [] if DEMO_FOLDER.is_dir() else [f"no {DEMO_FOLDER}; run {MAGIKA_FETCH}"]
    yield Table(
        "idle memory",
        f"Taken {SETTLE_S:.0f} s after ready, before any request. RSS counts shared pages in each "
        "process, PSS shares them out, USS leaves them out.",
        ("models", "process", "RSS MB", "PSS MB", "USS MB"),
        memory,
        notes,
    )
    yield Table(
        "start to ready",
        f"From exec to SERVING for the whole server by grpc.health.v1, {STARTS} starts, files "
        "cached.",
        ("models", "median s", "lowest s", "highest s"),
        [_starts(name, path, options) for name, path in repositories.items()],
        notes,
    )


def _memory(name: str, repository: Path, options: Options) -> list[tuple[str, ...]]:
    with servers.thirdrail(repository, options.folder) as server:
        time.sleep(SETTLE_S)
        all_used = [_used_mb(process) for process in server.processes]
    all_used.append([sum(column) for column in zip(*all_used, strict=True)])
    roles = ("front", "worker", "both")
    return [
        (name, role, *(f"{each:.0f}" for each in used))
        for role, used in zip(roles, all_used, strict=True)
    ]


def _used_mb(process: psutil.Process) -> list[float]:
    used = process.memory_full_info()
    return [used.rss / 1e6, used.pss / 1e6, used.uss / 1e6]


def _starts(name: str, repository: Path, options: Options) -> tuple[str, ...]:
    seconds = []
    for _ in range(STARTS):
        with servers.thirdrail(repository, options.folder) as server:
            seconds.append(server.start_s)
    figures = (statistics.median(seconds), min(seconds), max(seconds))
    return (name, *(f"{each:.2f}" for each in figures))
