# SPDX-License-Identifier: Apache-2.0
"""Servers, and commands, that start together on one empty cache: who builds, and who waits."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import servers
from bench.batching import MAGIKA_FOLDER as DEMO_FOLDER
from bench.build_neighbours import COMPILED, write_compiled
from bench.options import Options
from bench.report import Table
from thirdrail import Client
from thirdrail_engines.plans import Builder

AT_ONCE = 4
CAPABILITY = "sm86"

Seen = tuple[list[bool], float]  # of each whether it was a hit; seconds until the last had it


def run(options: Options) -> Table:
    repository = options.folder / "together"
    write_compiled(repository)
    return Table(
        "processes that start together",
        f"{AT_ONCE} of them on one empty cache, all in need of one plan. Counted is what each says "
        "of itself. Target: one build.",
        ("", "model", "builder", "builds", "hits", "until all have it, s"),
        list(_rows(repository, options.folder)),
    )


def _rows(repository: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    model = str(repository / COMPILED)
    yield _row("serve", COMPILED, Builder.ONNXRUNTIME, _servers(repository, folder))
    yield _row("compile", COMPILED, Builder.ONNXRUNTIME, _commands(folder / "a", model))
    if importlib.util.find_spec(Builder.TENSORRT_RTX) is not None:
        arguments = (str(DEMO_FOLDER / "magika"), "--for", CAPABILITY)
        yield _row("compile", "magika", Builder.TENSORRT_RTX, _commands(folder / "b", *arguments))


def _row(command: str, model: str, builder: Builder, seen: Seen) -> tuple[str, ...]:
    hits, elapsed_s = seen
    counts = str(hits.count(False)), str(hits.count(True))
    return f"{AT_ONCE} x thirdrail {command}", model, builder, *counts, f"{elapsed_s:.1f}"


def _servers(repository: Path, folder: Path) -> Seen:
    began = time.perf_counter()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(AT_ONCE) as threads:

        def start(number: int) -> servers.Server:
            place = folder / f"server-{number}"
            place.mkdir()
            arguments = [f"--cache-dir={folder / 'servers-cache'}"]
            return stack.enter_context(servers.thirdrail(repository, place, arguments))

        running = list(threads.map(start, range(AT_ONCE)))
        elapsed_s = time.perf_counter() - began
        return [_is_hit(server) for server in running], elapsed_s


def _is_hit(server: servers.Server) -> bool:
    with Client(server.unix, transport="grpc") as client:
        report = client.describe(COMPILED).engine_report
    assert report.plan_key, f"{COMPILED} is not run from a plan"
    return report.is_cache_hit


def _commands(cache: Path, *arguments: str) -> Seen:
    command = [sys.executable, "-m", "thirdrail", "compile", "--json", f"--cache-dir={cache}"]
    began = time.perf_counter()
    processes = [
        subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(AT_ONCE)
    ]
    answers = [process.communicate()[0] for process in processes]
    elapsed_s = time.perf_counter() - began
    results = [json.loads(answer)[0]["result"] for answer in answers]
    assert set(results) <= {"built", "cached"}, results
    return [result == "cached" for result in results], elapsed_s
