# SPDX-License-Identifier: Apache-2.0
"""A real server on a host with two GPUs, which are twins in their workers' processes."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import helper

from support.models import add, constant, gather, model, slow, tensor, write
from support.server import RunningServer, running_server
from support.twin_host import GPUS
from thirdrail import Client
from thirdrail.errors import ResourceExhausted, Unavailable
from thirdrail.v1 import metrics_pb2

FIRST, OTHER = (f"cuda:{each.uuid}" for each in GPUS)
ROW = np.zeros((1, 4), np.float32)
MIB = 1 << 20
UNTIL_S_MAX = 60


class Host:
    """A server, and a client of it over gRPC."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.client = Client(server.url, transport="grpc")

    def value(self, model: str) -> float:
        return float(self.client.infer(model, ROW)["c"][0, 0])

    def workers(self, model: str) -> list[str]:
        return [each.worker for each in self.client.models() if each.name == model]

    def worker(self, name: str) -> metrics_pb2.WorkerStatus:
        (found,) = [each for each in self.client.snapshot().workers if each.name == name]
        return found

    def requests(self, model: str) -> int:
        return sum(each.requests_ok for each in self.client.snapshot().models if each.name == model)


def until(is_so: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + UNTIL_S_MAX
    while not is_so():
        assert time.monotonic() < ends_s
        time.sleep(0.02)


def weights(value: float) -> onnx.ModelProto:
    """y = x W for a W of 4 MiB with `value` in its diagonal."""
    matrix = constant("w", np.eye(1024, dtype=np.float32) * np.float32(value))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    sides = [tensor(name, "FP32", ("n", 1024)) for name in "xy"]
    return model([node], sides[:1], sides[1:], [matrix])


def on(*gpus: int) -> str:
    return f"instance_group {{ gpus: {list(gpus)} }}"


ON_CPU = "instance_group { kind: KIND_CPU }"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    repository = folder / "models"
    write(repository, "everywhere", add(1))
    write(repository, "on_cpu", add(2), ON_CPU)
    write(repository, "on_other", add(3), "instance_group { gpus: [1] count: 2 }")
    write(repository, "on_all", add(4), f"instance_group {{}} {ON_CPU}")
    write(repository, "slow", slow())
    write(repository, "gather", gather(), on(1))
    write(repository, "nowhere", add(5), on(7))
    wanted = [f"--load-model={path.name}" for path in repository.iterdir()]
    write(repository, "moved", add(6), on(0))
    for name, config in (("a", on(0)), ("b", on(0)), ("c", on(1)), ("wide", on(0, 1))):
        write(repository, name, weights(1), config)
    budget = ("--device-memory-gib", str(6 / 1024))
    arguments = ("--model-control=explicit", *wanted, *budget)
    with running_server(repository, folder, arguments, module="support.twin_host") as server:
        found = Host(server)
        until(lambda: found.workers("everywhere") == [f"{FIRST}, {OTHER}"])
        until(lambda: found.workers("slow") == [f"{FIRST}, {OTHER}"])
        until(lambda: found.workers("on_all") == [f"{FIRST}, {OTHER}, cpu"])
        yield found
        found.client.close()


def test_models_are_where_their_instance_groups_say(host: Host) -> None:
    assert host.workers("on_cpu") == ["cpu"]
    assert host.workers("on_other") == [OTHER]
    assert [host.value(name) for name in ("everywhere", "on_cpu", "on_other")] == [1, 2, 3]
    instances = {name: host.client.describe(name).instances for name in ("on_all", "on_other")}
    assert instances == {"on_all": 3, "on_other": 2}
    engines = {each.name: each.engine for each in host.client.models()}
    assert (engines["on_cpu"], engines["everywhere"]) == ("onnxruntime", "twin on cuda")
    assert engines["on_all"] == "twin on cuda, onnxruntime"
    assert [each.name for each in host.client.snapshot().workers] == [FIRST, OTHER, "cpu"]


def test_a_gpu_that_is_not_here_is_refused_with_those_that_are(host: Host) -> None:
    (status,) = [each for each in host.client.models() if each.name == "nowhere"]
    there = ", ".join(f"{number} is {each.name} {each.uuid}" for number, each in enumerate(GPUS))
    assert status.state == "unavailable"
    assert status.reason == (
        f"instance_group[0] lists GPU 7, which this host does not have: {there}"
    )


def test_requests_go_where_fewer_are_and_the_death_of_one_worker_is_no_others_affair(
    host: Host,
) -> None:
    before = {name: host.requests(name) for name in ("everywhere", "slow")}
    pids = {each.name: each.pid for each in host.client.snapshot().workers}
    still = {"x": np.ones(1, np.float32), "turns": np.array(0)}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            host.client.infer, "slow", {**still, "turns": np.array(100_000_000)}
        )  # on the first GPU: minutes
        until(lambda: any(each.running for each in host.client.snapshot().models))
        for _ in range(3):
            host.client.infer("slow", still, timeout=60)  # its one instance there is taken
            host.value("everywhere")
        assert not running.done()
        os.kill(pids[FIRST], signal.SIGKILL)
        with pytest.raises(Unavailable, match="worker"):
            running.result(UNTIL_S_MAX)
    until(lambda: not host.worker(FIRST).is_serving or host.worker(FIRST).restarts == 1)
    assert [host.value(name) for name in ("everywhere", "on_cpu", "on_other")] == [1, 2, 3]
    until(lambda: host.worker(FIRST).restarts == 1)
    until(lambda: host.workers("everywhere") == [f"{FIRST}, {OTHER}"])
    until(lambda: host.workers("slow") == [f"{FIRST}, {OTHER}"])
    after = {each.name: each.pid for each in host.client.snapshot().workers}
    assert {name for name in pids if pids[name] != after[name]} == {FIRST}
    assert host.client.snapshot().workers[1].restarts == 0
    assert host.requests("everywhere") - before["everywhere"] == 4
    assert host.requests("slow") - before["slow"] == 3


def test_a_device_that_is_lost_takes_no_other_worker_with_it(host: Host) -> None:
    restarts = {each.name: each.restarts for each in host.client.snapshot().workers}
    with pytest.raises(Unavailable, match="the device was lost"):
        host.client.infer("gather", np.array([9]))  # an illegal access, to the twin
    until(lambda: host.worker(OTHER).restarts == restarts[OTHER] + 1)
    assert [host.value(name) for name in ("everywhere", "on_cpu")] == [1, 2]
    until(lambda: host.workers("everywhere") == [f"{FIRST}, {OTHER}"])
    until(lambda: host.client.health("gather"))
    assert list(host.client.infer("gather", np.array([2]))["y"]) == [12]
    after = {each.name: each.restarts for each in host.client.snapshot().workers}
    assert after == restarts | {OTHER: restarts[OTHER] + 1}
    assert "exit status 86 (the device was lost)" in host.server.log_text()


def test_each_device_has_a_budget_of_its_own(host: Host) -> None:
    host.client.load("a")
    text = rf"worker '{FIRST}' has no room for 'b': it needs 4\.0 MiB"
    with pytest.raises(ResourceExhausted, match=text):
        host.client.load("b")
    host.client.load("c")
    assert host.worker(FIRST).model_bytes_max == host.worker(OTHER).model_bytes_max == 6 * MIB
    assert host.worker("cpu").model_bytes_max == 0
    assert 4 * MIB <= host.worker(OTHER).model_bytes <= 6 * MIB

    host.client.unload("c")
    host.client.load("wide")  # there is room for a part of it
    assert host.workers("wide") == [OTHER]
    warnings = host.client.describe("wide").warnings
    assert any(
        f"not served by worker '{FIRST}': worker '{FIRST}' has no room" in w for w in warnings
    )
    host.client.unload("a")
    host.client.load("wide")  # and now for the other part: its old engine must not go on beside it
    assert host.workers("wide") == [FIRST]
    host.client.unload("wide")
    host.client.load("wide")
    assert host.workers("wide") == [f"{FIRST}, {OTHER}"]
    host.client.unload("wide")
    assert host.worker(FIRST).model_bytes < 4 * MIB


def test_a_model_moves_by_its_configuration(host: Host) -> None:
    repository = host.server.repository
    for config, workers in (
        (on(0), FIRST),
        (ON_CPU, "cpu"),
        (on(0, 1), f"{FIRST}, {OTHER}"),
        (on(1), OTHER),
    ):
        write(repository, "moved", add(len(workers)), config)
        host.client.load("moved")
        assert host.workers("moved") == [workers]
        assert host.value("moved") == len(workers)
    host.client.unload("moved")
    write(repository, "moved", add(6), on(0))
    host.client.load("moved")
    assert host.workers("moved") == [FIRST]
    host.client.unload("moved")
    (status,) = [each for each in host.client.models() if each.name == "moved"]
    assert (status.state, status.reason) == ("unavailable", "unloaded")
