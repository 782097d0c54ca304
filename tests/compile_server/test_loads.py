# SPDX-License-Identifier: Apache-2.0
"""Models that are compiled when a real server loads them: what is told of it, and where."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from conftest import StartServer
from support.compiled import parameters, status_of, until_ready, write_compiled
from support.models import double, write
from support.perceptrons import two_layers, with_outputs_swapped
from support.server import RunningServer, running_server
from thirdrail import Client, LoadProgress
from thirdrail_engines.compile_options import read_compile_options
from thirdrail_engines.compiling import CompileServices, compile_plan
from thirdrail_engines.plan_cache import PlanCache, key_of
from thirdrail_engines.plan_requests import onnxruntime_request
from thirdrail_server.config import CompileConfig, ConfigError
from thirdrail_server.inference import grpc_service_pb2 as kserve
from thirdrail_server.inference import grpc_service_pb2_grpc
from thirdrail_server.worker.plans import Plans, refuse_untrusted_caches

GIB = 1 << 30
TENSORRTS = ("tensorrt on cuda", "tensorrt_rtx on cuda")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of models that end in different ways."""
    folder = tmp_path_factory.mktemp("repository")
    write_compiled(folder, "compiled", two_layers())
    write_compiled(folder, "swapped", two_layers(seed=1))
    write(folder, "fallen", double(), "backend: 'tensorrt'")
    write(folder, "strict", double(), parameters(engine="tensorrt_rtx", on_compile_failure="fail"))
    write(folder, "mistaken", double(), parameters(precision="int4"))
    write(folder, "plain", double())
    return folder


@pytest.fixture(scope="module")
def cache(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    put_wrong_plan(folder, repository / "swapped" / "1" / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def server(
    repository: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    arguments = ("--model-control=explicit", "--load-model=*", f"--cache-dir={cache}")
    with running_server(repository, tmp_path_factory.mktemp("server"), arguments) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.url) as connected:
        until_ready(connected, "compiled")
        yield connected


def put_wrong_plan(folder: Path, path: Path) -> None:
    """The plan of a damaged copy, in the place of the model's own."""
    damaged = folder / "damaged.onnx"
    onnx.save(with_outputs_swapped(onnx.load(path)), damaged)
    with PlanCache(folder, GIB) as cache:
        options = read_compile_options({})
        precision = options.precision
        made, _ = compile_plan(
            onnxruntime_request(damaged, options, precision=precision, threads_max=1),
            CompileServices(cache),
        )
        wanted = key_of(onnxruntime_request(path, options, precision=precision, threads_max=1))
        with cache.workspace() as work:
            (work / "plan").write_bytes(made.data)
            cache.put(wanted, work / "plan", made.manifest)


def figure(client: Client, name: str, **labels: str) -> float:
    """Of one Prometheus metric."""
    for line in client.metrics().splitlines():
        if line.startswith(name) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no {name} with {labels}")


def thirdrail(server: RunningServer, *arguments: str) -> str:
    command = [sys.executable, "-m", "thirdrail", "--url", server.url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_plan_is_built_and_proven(server: RunningServer, client: Client) -> None:
    found = client.describe("compiled")
    assert (found.status.engine, found.status.engine_reason) == ("onnxruntime plan", "")
    report = found.engine_report
    assert len(report.plan_key) == 64
    assert not report.is_cache_hit
    assert report.build_s > 0
    assert {each.output for each in report.proofs} == {"y", "z", "most"}
    assert report.proof_reference == "onnxruntime"
    assert all(each.max_rel_error < 1e-3 and each.equal == 1 for each in report.proofs)
    assert figure(client, "thirdrail_plan_cache_misses_total", model="compiled") == 1
    assert figure(client, "thirdrail_plan_build_seconds_total", model="compiled") > 0
    assert figure(client, "thirdrail_proof_cosine", model="compiled", output="y") > 0.999
    printed = thirdrail(server, "describe", "compiled")
    assert f"plan {report.plan_key[:12]}: built for this load in" in printed
    assert "against ONNX Runtime on the CPU:" in printed


def test_a_fallback_is_seen_everywhere(server: RunningServer, client: Client) -> None:
    status = status_of(client, "fallen")
    assert (status.is_ready, status.engine, status.reason) == (True, "onnxruntime", "")
    assert status.engine_reason.startswith(TENSORRTS)
    assert client.infer("fallen", {"x": [1.0, 2.0]})["y"].tolist() == [2, 4]
    assert figure(client, "thirdrail_engine_fallbacks_total", model="fallen") == 1
    assert figure(client, "thirdrail_engine_fallbacks_total", model="plain") == 0
    assert status_of(client, "plain").engine_reason == ""
    index = index_of(server)
    assert index["fallen"].state == "READY"
    assert index["fallen"].reason == status.engine_reason
    assert index["plain"].reason == ""
    rows = thirdrail(server, "models").splitlines()
    assert any(line.split()[:4] == ["fallen", "1", "ready", "onnxruntime"] for line in rows)
    assert f"fallen 1: {status.engine_reason}" in rows
    assert f"'fallen' version 1 is run by onnxruntime, not by {status.engine_reason}" in (
        server.log_text()
    )


@pytest.mark.slow
def test_a_load_says_that_another_engine_runs_the_model(
    server: RunningServer, client: Client
) -> None:
    command = [sys.executable, "-m", "thirdrail", "load", "fallen", "--url", server.url]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "fallen is ready: version 1\n"
    assert ended.stderr == f"fallen 1: {status_of(client, 'fallen').engine_reason}\n"


def index_of(server: RunningServer) -> dict[str, kserve.RepositoryIndexResponse.ModelIndex]:
    with server.channel() as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        found = stub.RepositoryIndex(kserve.RepositoryIndexRequest())
    return {each.name: each for each in found.models}


def test_whoever_must_not_fall_back_is_not_served(server: RunningServer, client: Client) -> None:
    status = status_of(client, "strict")
    assert (status.state, status.engine) == ("unavailable", "")
    assert "CUDA" in status.reason or "tensorrt_rtx" in status.reason
    printed = " ".join(thirdrail(server, "describe", "strict").split())
    assert printed == f"strict version 1, unavailable: {status.reason}"


def test_a_mistake_in_the_configuration_names_the_line_that_would_do(client: Client) -> None:
    status = status_of(client, "mistaken")
    assert status.state == "unavailable"
    assert "parameters['precision'] is 'int4', expected one of as_is, fp16" in status.reason
    assert 'for example: parameters { key: "precision"' in status.reason


def test_a_plan_that_is_not_what_the_model_says_is_found_out(client: Client) -> None:
    status = status_of(client, "swapped")
    assert status.engine == "onnxruntime"
    assert status.engine_reason.startswith("onnxruntime plan: not proven: ")


def test_a_load_tells_its_phases(repository: Path, server: RunningServer, client: Client) -> None:
    write_compiled(repository, "told", two_layers(seed=2))
    told: list[LoadProgress] = []
    assert client.load("told", progress=told.append) == [1]
    phases = list(dict.fromkeys(each.phase for each in told))
    assert phases[0] == "reading"
    assert "optimising" in phases
    assert phases[-4:] == ["loading the engine", "proving the engine", "warming up", "ready"]
    assert any(each.phase_steps for each in told)
    steps = [each.step for each in told]
    assert steps == sorted(steps)
    assert thirdrail(server, "load", "told") == "told is ready: version 1\n"
    assert client.describe("told").engine_report.is_cache_hit


@pytest.mark.slow
def test_a_plan_is_found_after_a_restart_and_in_a_cache_that_is_only_read(
    tmp_path: Path, start_server: StartServer
) -> None:
    repository, filled = tmp_path / "repository", tmp_path / "filled"
    write_compiled(repository, "m", two_layers())
    write(repository, "fallen", double(), parameters(engine="tensorrt_rtx"))
    command = [sys.executable, "-m", "thirdrail", "compile", str(repository / "m")]
    subprocess.run([*command, f"--cache-dir={filled}"], check=True, capture_output=True)
    server = start_server(
        repository,
        f"--cache-dir={tmp_path / 'own'}",
        f"--read-only-cache={filled}",
        "--no-fallback",
    )
    with Client(server.url) as client:
        assert client.describe("m").engine_report.is_cache_hit
        assert figure(client, "thirdrail_plan_cache_hits_total", model="m") == 1
        assert figure(client, "thirdrail_plan_cache_misses_total", model="m") == 0
        assert status_of(client, "fallen").state == "unavailable"


def test_a_cache_that_everybody_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    command = [sys.executable, "-m", "thirdrail", "serve", str(tmp_path / "models"), "--no-tcp"]
    command += [f"--socket={tmp_path / 's'}", f"--cache-dir={folder}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert f"chmod o-w {folder}" in ended.stderr


def test_caches_are_judged_before_anything_else(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    refuse_untrusted_caches(CompileConfig(own))  # made when it is needed
    missing = CompileConfig(own, read_only_caches=(other,))
    with pytest.raises(ConfigError, match=f"cache {other}: No such file"):
        refuse_untrusted_caches(missing)
    other.mkdir()
    refuse_untrusted_caches(missing)
    other.chmod(0o777)
    with pytest.raises(ConfigError, match=f"chmod o-w {other}"):
        refuse_untrusted_caches(missing)


def test_a_worker_that_can_write_nowhere_keeps_no_plans(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    plans = Plans(CompileConfig(cache_dir=Path("/proc/thirdrail")))
    assert plans.services(lambda *_phase: None, threading.Event()).cache is None
    assert "plans are not kept: " in caplog.text
