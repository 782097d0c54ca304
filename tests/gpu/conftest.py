# SPDX-License-Identifier: Apache-2.0
"""Tests on a real CUDA device: `make test-gpu`. Without one they are skipped, and say why.

THIRDRAIL_TEST_UUID chooses among several devices. With THIRDRAIL_TEST_TWIN=1, those about a whole
server run on a twin, so that their code is tested. As of now: not yet run on a GPU.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from cuda_lane.conftest import write_models
from engines.conftest import build_model_fixture, identity, inspector, write_model
from support.cuda_regions import Memory, device_memory
from support.models import add, write
from support.server import RunningServer, running_server
from thirdrail.v1 import metrics_pb2, metrics_pb2_grpc
from thirdrail_engines.cuda.driver import DriverDevice, open_device
from thirdrail_engines.plans import Builder, BuildError

__all__ = ["build_model_fixture", "identity", "inspector", "write_model"]


@pytest.fixture(scope="session")
def is_twin() -> bool:
    return bool(os.environ.get("THIRDRAIL_TEST_TWIN"))


@pytest.fixture(scope="session")
def why_no_gpu(is_twin: bool) -> str:
    if is_twin:
        return ""
    try:
        open_device(os.environ.get("THIRDRAIL_TEST_UUID", "")).close()
    except BuildError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def needs_gpu(why_no_gpu: str) -> None:
    if why_no_gpu:
        pytest.skip(why_no_gpu)


@pytest.fixture
def device(needs_gpu: None, is_twin: bool) -> Iterator[DriverDevice]:
    if is_twin:
        pytest.skip("this is about a GPU alone")
    opened = open_device(os.environ.get("THIRDRAIL_TEST_UUID", ""))
    yield opened
    opened.close()


@pytest.fixture(params=[Builder.TENSORRT_RTX, Builder.TENSORRT])
def builder(request: pytest.FixtureRequest) -> Builder:
    """Each TensorRT that is installed."""
    from thirdrail_engines.tensorrt import installed_builders

    wanted: Builder = request.param
    if wanted not in dict(installed_builders()):
        pytest.skip(f"{wanted} is not installed")
    return wanted


@pytest.fixture(scope="module")
def gpu_server(
    why_no_gpu: str, is_twin: bool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server with plus_one and the models of tests/cuda_lane; clients may register memory."""
    if why_no_gpu:
        pytest.skip(why_no_gpu)
    repository = tmp_path_factory.mktemp("models")
    write(repository, "plus_one", add(1))
    write_models(repository)
    module = "support.twin_lane_server" if is_twin else "thirdrail"
    folder = tmp_path_factory.mktemp("server")
    with running_server(repository, folder, ["--allow-client-shm"], module=module) as running:
        yield running


@pytest.fixture
def gpu_worker_pid(gpu_server: RunningServer) -> Callable[[], int]:
    def look() -> int:
        with gpu_server.channel() as channel:
            figures = metrics_pb2_grpc.MetricsStub(channel).Snapshot(metrics_pb2.SnapshotRequest())
        return next(each.pid for each in figures.workers if each.name.startswith("cuda:"))

    return look


@pytest.fixture
def make_memory() -> Callable[[int], AbstractContextManager[Memory]]:
    return device_memory
