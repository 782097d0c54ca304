# SPDX-License-Identifier: Apache-2.0
"""Clients on the lanes of a server with several workers: they call models wherever those are."""

import asyncio
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from devices.test_host_with_gpus import FIRST, ON_CPU, OTHER, ROW, Host, on, until
from support.models import add, write
from support.server import running_server
from thirdrail import CallerError, Client, Device
from thirdrail.aio import AsyncClient, AsyncDevice
from thirdrail.errors import NotFound
from thirdrail.probing import probe_server
from thirdrail.v1 import sessions_pb2, sessions_pb2_grpc

pytestmark = pytest.mark.slow  # servers with three workers take long to start

MODELS = {"everywhere": 1.0, "on_cpu": 2.0, "on_other": 3.0}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    repository = folder / "models"
    for name, config in (("everywhere", ""), ("on_cpu", ON_CPU), ("on_other", on(1))):
        write(repository, name, add(MODELS[name]), config)
    write(repository, "moved", add(4), on(0))
    arguments = ("--model-control=explicit", "--load-model=*")
    with running_server(repository, folder, arguments, module="support.twin_host") as server:
        found = Host(server)
        until(lambda: found.workers("everywhere") == [f"{FIRST}, {OTHER}"])
        found.client.wait_ready()
        yield found
        found.client.close()


class Lanes:
    """The sessions that were opened after this one was made."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._before = {(each.worker, each.session) for each in self._listed()}

    def workers(self) -> set[str]:
        """That had calls."""
        new = [each for each in self._listed() if (each.worker, each.session) not in self._before]
        return {each.worker for each in new if each.calls}

    def _listed(self) -> list[sessions_pb2.SessionInfo]:
        with self._host.server.channel() as channel:
            stub = sessions_pb2_grpc.SessionsStub(channel)
            return list(stub.ListSessions(sessions_pb2.ListSessionsRequest()).sessions)


def test_each_model_is_called_where_it_is(host: Host) -> None:
    lanes = Lanes(host)
    with Client(host.server.url, transport="lane") as client:
        for name, value in MODELS.items():
            assert client.infer(name, ROW)["c"][0, 0] == value
        array = client.empty((1, 4))  # in the first worker's memory; copied for the others
        array[...] = 10
        assert [client.infer(name, array)["c"][0, 0] for name in MODELS] == [11, 12, 13]
        futures = {name: client.submit(name, ROW) for name in MODELS}
        assert {name: future.result()["c"][0, 0] for name, future in futures.items()} == MODELS
        assert lanes.workers() == {FIRST, OTHER, "cpu"}
        assert client.transport.name == "lane"
        with pytest.raises(NotFound, match="'nothing' is not found"):
            client.infer("nothing", ROW)


@pytest.mark.slow
def test_a_probe_tries_the_lane_to_each_worker(host: Host) -> None:
    with host.server.channel() as channel:
        found = probe_server(host.server.url, channel, None).transports
    lanes = {each.name: each for each in found if each.name.partition(" ")[0] == "lane"}
    assert list(lanes) == ["lane", f"lane to {OTHER}", "lane to cpu"]
    assert all(each.works for each in lanes.values())
    assert FIRST.replace(":", "-") in lanes["lane"].address


def test_a_stream_goes_to_all_workers(host: Host) -> None:
    lanes = Lanes(host)
    with Client(host.server.url, transport="lane") as client:
        with client.stream(in_flight_max=2) as stream:
            futures = [(stream.submit(name, ROW), MODELS[name]) for name in list(MODELS) * 5]
        assert all(future.done() for future, _ in futures)
        assert [future.result()["c"][0, 0] for future, _ in futures] == [v for _, v in futures]
        assert lanes.workers() == {FIRST, OTHER, "cpu"}


async def test_the_same_from_asyncio(host: Host) -> None:
    lanes = await asyncio.to_thread(Lanes, host)
    async with AsyncClient(host.server.url, transport="lane") as client:
        calls = [client.infer(name, ROW) for name in MODELS]
        assert [each["c"][0, 0] for each in await asyncio.gather(*calls)] == list(MODELS.values())
        async with client.stream() as stream:
            tasks = {name: stream.submit(name, ROW) for name in MODELS}
        assert {name: task.result()["c"][0, 0] for name, task in tasks.items()} == MODELS
        assert await asyncio.to_thread(lanes.workers) == {FIRST, OTHER, "cpu"}
        with pytest.raises(NotFound, match="'nothing' is not found"):
            await client.infer("nothing", ROW)


async def test_a_device_is_that_of_its_worker(host: Host) -> None:
    uuids = [worker.removeprefix("cuda:") for worker in (FIRST, OTHER)]
    with Client(host.server.url) as client:
        devices = [Device(client, wanted) for wanted in ("cuda", *uuids)]
        assert [each.uuid for each in devices] == [uuids[0], *uuids]
        for each in devices:
            assert each.infer("everywhere", each.array(ROW))["c"].numpy()[0, 0] == 1
        with pytest.raises(CallerError, match="not on 'GPU-none'"):
            Device(client, "GPU-none")
    async with AsyncClient(host.server.url) as other:
        for wanted, uuid in (("", uuids[0]), (uuids[1][:12].lower(), uuids[1])):
            device = await AsyncDevice(other, wanted)
            assert device.uuid == uuid
            result = await device.infer("everywhere", await device.array(ROW))
            assert result["c"].numpy()[0, 0] == 1


async def test_a_model_that_moved_is_found_again(host: Host) -> None:
    with Client(host.server.url, transport="lane") as client:
        async with AsyncClient(host.server.url, transport="lane") as other:
            for config in (on(0), on(1), ON_CPU):
                write(host.server.repository, "moved", add(4), config)
                await asyncio.to_thread(host.client.load, "moved")
                assert (await asyncio.to_thread(client.infer, "moved", ROW))["c"][0, 0] == 4
                assert (await other.infer("moved", ROW))["c"][0, 0] == 4


def test_the_death_of_a_worker_leaves_the_calls_of_others_alone(host: Host) -> None:
    with Client(host.server.url) as client:
        assert client.infer("on_other", ROW)["c"][0, 0] == 3
        assert client.infer("everywhere", ROW)["c"][0, 0] == 1
        os.kill(host.worker(FIRST).pid, signal.SIGKILL)
        until(lambda: not client.health("moved") or host.worker(FIRST).restarts == 1)
        for _ in range(20):
            assert client.infer("on_other", ROW)["c"][0, 0] == 3
            assert client.infer("everywhere", ROW)["c"][0, 0] == 1
        until(lambda: host.workers("everywhere") == [f"{FIRST}, {OTHER}"])
        assert np.all(client.infer("everywhere", ROW)["c"] == 1)


def test_calls_in_flight_are_spread(host: Host) -> None:
    """The least busy of our own sessions is taken, so two calls at once go to two workers."""
    lanes = Lanes(host)
    with Client(host.server.url, transport="lane") as client, client.stream() as stream:
        for _ in range(200):
            stream.submit("everywhere", ROW)
        assert lanes.workers() == {FIRST, OTHER}
