# SPDX-License-Identifier: Apache-2.0
"""Two workers on the CPU stand in for two devices: each request goes to where its model is."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from support.models import add, write
from support.worker import RunningWorker, running_worker
from thirdrail.lane.aio import AsyncLane, Reply
from thirdrail.tensors import array_of_tensor, tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.config import WorkerConfig
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.dispatch import Dispatcher
from thirdrail_server.repository.device_choice import Device

ONE = Device("GPU-0a6a6e2f-0c4f-4f56-93f4-5bd2f4d0c001")
OTHER = Device("GPU-7d1c9f3e-52a2-4c0e-9f0b-1f6f5f3b2c02")


class Twins:
    """Each worker has one model of its own, and both have `moved`, which adds another value."""

    def __init__(self, workers: dict[str, RunningWorker], repositories: dict[str, Path]) -> None:
        self.workers = workers
        self.catalog = Catalog(models_max=8, watchers_max=1)
        for name, worker in workers.items():
            loaded = worker.load(repositories[name])
            for model, what in loaded.items():
                self.catalog.begin_load(model, [1], name)
                self.catalog.end_load(model, what, name)
        self.catalog.leave("moved", next(iter(workers)))

    async def asked(self, *models: str, killed: str = "") -> list[Reply]:
        """Over lanes of this loop. killed: a worker that dies before."""
        dispatcher = Dispatcher(self.catalog)
        lanes = []
        for name, worker in self.workers.items():
            worker.sockets[0].setblocking(False)
            lanes.append(await AsyncLane.attach(worker.sockets.pop(0)))
            dispatcher.attach(lanes[-1], name)
        assert dispatcher.inline_bytes_max > 0
        if killed:
            self.workers[killed].process.kill()
            self.catalog.worker_died(killed, ["on_2"])
        requests = [request(model) for model in models]
        calls = [dispatcher.infer(each, [None], flow=0) for each in requests]
        calls += [
            dispatcher.infer_bytes(each.SerializeToString(), each, flow=0) for each in requests
        ]
        replies = await asyncio.gather(*calls)
        assert dispatcher.calls_in_flight == 0
        for lane in lanes:
            lane.close("over")
        return replies


def request(model: str) -> pb.InferRequest:
    tensor = tensor_of_array("a", np.zeros((1, 4), np.float32))
    return pb.InferRequest(model_name=model, inputs=[tensor])


def value(reply: Reply) -> float:
    assert not reply.response.status.reason, reply.response.status
    return float(array_of_tensor(reply.response.outputs[0])[0, 0])


@pytest.fixture
def twins(tmp_path: Path) -> Iterator[Twins]:
    repositories = {}
    for number, device in enumerate((ONE, OTHER), start=1):
        repositories[device.worker] = folder = tmp_path / str(number)
        write(folder, f"on_{number}", add(number))
        write(folder, "moved", add(10 * number))
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(running_worker(WorkerConfig(name=name)))
            for name in repositories
        }
        yield Twins(workers, repositories)


async def test_each_request_goes_to_the_worker_of_its_model(twins: Twins) -> None:
    replies = await twins.asked("on_1", "on_2", "moved", "nowhere")
    for found in (replies[:4], replies[4:]):
        assert [value(reply) for reply in found[:3]] == [1, 2, 20]
        assert found[3].response.status.reason == pb.REASON_NOT_FOUND
        assert "'nowhere' is not found" in found[3].response.status.message


async def test_the_death_of_one_worker_is_no_matter_to_the_other(twins: Twins) -> None:
    replies = await twins.asked("on_1", "on_2", killed=OTHER.worker)
    for alive, dead in (replies[:2], replies[2:]):
        assert value(alive) == 1
        assert dead.response.status.reason == pb.REASON_UNAVAILABLE
        assert f"worker '{OTHER.worker}' died" in dead.response.status.message
