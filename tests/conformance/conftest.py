# SPDX-License-Identifier: Apache-2.0
"""The ways in, as the fixture `caller`: a test of this folder runs once for each of them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from support.aio_caller import OverAsyncSession
from support.callers import Caller, NativeStream, NativeUnary, OverBlockingLane, OverLane
from support.kserve_callers import KServeStream, KServeUnary
from support.models import add, constant, identity, model, tensor, write, write_standard_repository
from support.server import RunningServer, running_server
from support.worker import RunningWorker, running_worker

OPEN: dict[str, Callable[[pytest.FixtureRequest], Caller]] = {
    "unary": lambda request: NativeUnary(request.getfixturevalue("versatile_server")),
    "stream": lambda request: NativeStream(request.getfixturevalue("versatile_server")),
    "lane": lambda request: OverLane(request.getfixturevalue("versatile_worker")),
    "blocking-lane": lambda request: OverBlockingLane(request.getfixturevalue("versatile_worker")),
    "asyncio-lane": lambda request: OverAsyncSession(request.getfixturevalue("versatile_worker")),
    "kserve-unary": lambda request: KServeUnary(request.getfixturevalue("versatile_server")),
    "kserve-stream": lambda request: KServeStream(request.getfixturevalue("versatile_server")),
}


@pytest.fixture(scope="session", params=OPEN)
def caller(request: pytest.FixtureRequest) -> Iterator[Caller]:
    opened = OPEN[request.param](request)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def versatile_server(
    versatile_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    with running_server(versatile_repository, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def versatile_worker(versatile_repository: Path) -> Iterator[RunningWorker]:
    # One for each way onto a lane; several where tests are spread over processes, which may go
    # through the ways more than once.
    with running_worker(lanes=24) as running:
        running.load(versatile_repository)
        yield running


@pytest.fixture(scope="session")
def versatile_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The standard models, and: versions (1 adds 1, 3 adds 3), two (sum and difference), scalar,
    optional (its second input has a default), picks (gather that batches)."""
    folder = tmp_path_factory.mktemp("repository")
    write_standard_repository(folder)
    write(folder, "versions", add(1), "version_policy { all {} }", version=1)
    write(folder, "versions", add(3), version=3)
    write(folder, "two", _sum_and_difference())
    write(folder, "scalar", identity(shape=()))
    write(folder, "optional", _with_default())
    write(folder, "picks", _picks(), PICKS_CONFIG)
    return folder


# Long enough for a test's requests to meet, however busy the host is.
PICKS_CONFIG = """
max_batch_size: 4
dynamic_batching { preferred_batch_size: [4] max_queue_delay_microseconds: 5000000 }
"""


def _sum_and_difference() -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"])]
    nodes.append(helper.make_node("Sub", ["a", "b"], ["difference"]))
    outputs = [tensor("sum", "FP32", ("n",)), tensor("difference", "FP32", ("n",))]
    return model(nodes, [tensor("a", "FP32", ("n",)), tensor("b", "FP32", ("n",))], outputs)


def _with_default() -> onnx.ModelProto:
    """y = x + d, where d is 5 unless it is given."""
    node = helper.make_node("Add", ["x", "d"], ["y"])
    inputs = [tensor("x", "FP32", ("n",)), tensor("d", "FP32", (1,))]
    default = constant("d", np.array([5], np.float32))
    return model([node], inputs, [tensor("y", "FP32", ("n",))], [default])


def _picks() -> onnx.ModelProto:
    """y = table[index] for [n, 1]: one wrong index fails the run that it is in."""
    table = constant("table", np.array([10, 11, 12, 13], np.float32))
    node = helper.make_node("Gather", ["table", "index"], ["y"])
    index = tensor("index", "INT64", ("n", 1))
    return model([node], [index], [tensor("y", "FP32", ("n", 1))], [table])
