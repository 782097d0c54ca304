# SPDX-License-Identifier: Apache-2.0
"""perf_analyzer, Triton's load generator, in its gRPC mode.

The program comes inside tritonclient's wheel; two shared libraries that it is linked to come from
elsewhere.
"""

import csv
import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.environments import debian_packages, python_environment, requirements_in, run
from support.server import RunningServer
from thirdrail import Client
from thirdrail.v1 import metrics_pb2

pytestmark = [pytest.mark.needs_packages, pytest.mark.timeout(600)]

REQUIREMENTS = Path(__file__).parent / "requirements" / "perf_analyzer.txt"
REQUESTS = 300
CONCURRENCY = 4
# What makes a run short: one window of so many requests, wherever the figures then stand.
SHORT = [f"--request-count={REQUESTS}", f"--concurrency-range={CONCURRENCY}"]


@dataclass(frozen=True, slots=True)
class Measured:
    text: str
    row: dict[str, str]  # of the report that it writes as CSV
    served: metrics_pb2.ModelCounters  # meanwhile, by the server's own counters

    def count(self, name: str) -> int:
        """A figure such as "Execution count", which perf_analyzer had from ModelStatistics."""
        found = re.search(rf"{name}: (\d+)", self.text)
        assert found, f"no {name} in:\n{self.text}"
        return int(found[1])


Analyze = Callable[..., Measured]


@pytest.fixture(scope="module")
def analyze_at(tmp_path_factory: pytest.TempPathFactory) -> Analyze:
    """analyze_at(server, model, *arguments)"""
    environment = python_environment(
        "perf-analyzer", requirements_in(REQUIREMENTS), dependencies=False
    )
    libraries = [
        environment.packages() / "nvidia" / "cuda_runtime" / "lib",
        *(debian_packages("libb64", ["libb64-0d"]) / "usr" / "lib").glob("*-linux-gnu"),
    ]
    program = environment.folder / "bin" / "perf_analyzer"

    def measure(server: RunningServer, model: str, *arguments: str) -> Measured:
        target = ["-i", "grpc", "-u", server.address]
        report = tmp_path_factory.mktemp("perf") / "report.csv"
        before = counters(server, model)
        done = run(
            [str(program), "-m", model, *target, *SHORT, "-f", str(report), *arguments],
            {"LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))},
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log_text()}"
        print(done.stdout)
        after = counters(server, model)
        served = metrics_pb2.ModelCounters(
            requests_ok=after.requests_ok - before.requests_ok,
            rows=after.rows - before.rows,
            batches=after.batches - before.batches,
        )
        with report.open(newline="") as file:
            return Measured(done.stdout, next(csv.DictReader(file)), served)

    return measure


def counters(server: RunningServer, model: str) -> metrics_pb2.ModelCounters:
    """Of a model with one version; those of a model that is not there are 0."""
    with Client(server.url, transport="grpc") as client:
        found = [each for each in client.snapshot().models if each.name == model]
    return found[0] if found else metrics_pb2.ModelCounters()


@pytest.fixture(scope="module")
def analyze(server: RunningServer, analyze_at: Analyze) -> Analyze:
    return functools.partial(analyze_at, server)


def assert_plausible(measured: Measured) -> None:
    assert float(measured.row["Inferences/Second"]) > 0, measured.text
    assert int(measured.row["p50 latency"]) > 0, measured.text
    assert int(measured.row["Server Compute Infer"]) > 0, measured.text
    assert measured.served.requests_ok == REQUESTS, measured.text
    # It asks the server for its figures while requests are under way, at both ends.
    assert 0 < measured.count("Successful request count") <= REQUESTS, measured.text
    assert 0 < measured.count("Request count") <= REQUESTS, measured.text


def test_unary(analyze: Analyze) -> None:
    assert_plausible(analyze("plus_one", "--shape=a:1,4"))


def test_unary_asynchronous(analyze: Analyze) -> None:
    assert_plausible(analyze("plus_one", "--shape=a:1,4", "-a"))


def test_streaming(analyze: Analyze) -> None:
    assert_plausible(analyze("plus_one", "--shape=a:1,4", "--streaming", "-a"))


def test_batched_requests(analyze: Analyze) -> None:
    measured = analyze("add", "-b", "2", "-a")
    assert_plausible(measured)
    assert measured.served.rows == 2 * REQUESTS
    assert measured.served.batches < REQUESTS, f"no two shared a batch:\n{measured.text}"
    inferences, executions = measured.count("Inference count"), measured.count("Execution count")
    assert 0 < executions < inferences <= 2 * REQUESTS, measured.text


def test_text(analyze: Analyze) -> None:
    assert_plausible(analyze("identity_bytes", "--shape=x:3", "--string-length=20"))


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("plus_one", ["--shape=a:1,4"]),
        ("plus_one", ["--shape=a:1,4", "-a"]),
        ("plus_one", ["--shape=a:1,4", "--streaming", "-a"]),
        ("add", ["-b", "2", "-a"]),
        ("identity_bytes", ["--shape=x:3", "--string-length=20"]),
        ("identity_fp32", ["--shape=x:1000000", "--output-shared-memory-size=4000000"]),
    ],
    ids=["unary", "asynchronous", "streaming", "batched", "text", "large"],
)
def test_system_shared_memory(
    start_server: Callable[..., RunningServer],
    standard_repository: Path,
    analyze_at: Analyze,
    model: str,
    arguments: list[str],
) -> None:
    server = start_server(standard_repository, "--allow-client-shm=true")
    assert_plausible(analyze_at(server, model, "--shared-memory=system", *arguments))
    assert "Traceback" not in server.log_text()


def test_a_model_that_is_not_there(server: RunningServer, analyze: Analyze) -> None:
    with pytest.raises(AssertionError, match="Request for unknown model: 'unheard_of'"):
        analyze("unheard_of")
