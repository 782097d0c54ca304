# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom when much has to be built: nobody whose own plan is there or not needed."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import StartServer
from support.compiled import held_build, until_ready, write_compiled
from support.models import identity, write
from support.perceptrons import two_layers
from thirdrail import Client
from thirdrail_engines.compile_options import read_compile_options
from thirdrail_engines.compiling import CompileServices, compile_plan
from thirdrail_engines.plan_cache import PlanCache
from thirdrail_engines.plan_requests import onnxruntime_request
from thirdrail_server.config import CompileConfig, WorkerConfig

# More than there are threads or permits for loads.
MANY = WorkerConfig().loads_at_once_max + CompileConfig().loads_at_once_max + 3
WAIT_S_MAX = 60.0


@pytest.mark.slow
def test_a_load_that_needs_no_build_waits_for_none(
    tmp_path: Path, start_server: StartServer
) -> None:
    folder, cache = tmp_path / "repository", tmp_path / "cache"
    write_compiled(folder, "there", two_layers(seed=1))
    with PlanCache(cache, 1 << 30) as filled:
        there = folder / "there/1/model.onnx"
        options = read_compile_options({})
        request = onnxruntime_request(there, options, precision=options.precision, threads_max=1)
        compile_plan(request, CompileServices(filled))
    names = [f"m{number}" for number in range(MANY)]
    for name in names:
        write_compiled(folder, name, two_layers())
    write(folder, "plain", identity())
    wanted = [f"--load-model={name}" for name in names]
    server = start_server(
        folder, "--model-control=explicit", f"--cache-dir={cache}", *wanted, wait=False
    )
    with Client(server.url) as client, ThreadPoolExecutor(1) as thread:
        with held_build(server):
            until_all_wait(client, names)
            for name in ("plain", "there"):  # which would wait for ever otherwise
                assert thread.submit(client.load, name).result(WAIT_S_MAX) == [1]
            assert client.describe("there").engine_report.is_cache_hit
            assert not any(each.is_ready for each in client.models() if each.name in names)
        until_ready(client, names[0])


def until_all_wait(client: Client, names: list[str]) -> None:
    """For the build of their plan."""
    ends_s = time.monotonic() + WAIT_S_MAX
    while time.monotonic() < ends_s:
        waiting = {each.name for each in client.models() if "build" in each.load_phase}
        if waiting.issuperset(names):
            return
        time.sleep(0.02)
    raise AssertionError(f"only {sorted(waiting)} wait")
