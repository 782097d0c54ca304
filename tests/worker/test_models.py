# SPDX-License-Identifier: Apache-2.0
"""The models of a worker: what a load changes, what a failed one leaves, who finishes where."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest

import thirdrail_engines
from support.engines import WatchedEngine
from support.models import add, gather, write
from support.sessions import Session
from thirdrail.errors import InvalidArgument, NotFound, ThirdrailError, Unavailable
from thirdrail_engines import ModelFileError
from thirdrail_server.config import WorkerConfig
from thirdrail_server.control_messages import LoadCommand, LoadedModel, LoadProgress
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.layout import scan
from thirdrail_server.repository.model_config import read_config
from thirdrail_server.worker.calls import Call, Ending
from thirdrail_server.worker.models import ModelTable
from thirdrail_server.worker.served_version import ServedVersion

ALL = "version_policy { all {} }"
DAMAGED = b"no model"
A = {"a": np.zeros((1, 4), np.float32)}


class Table:
    """A worker's models, loaded from a folder that the test changes."""

    def __init__(self, repository: Path, session: Session, drain_s_max: float = 20) -> None:
        self.repository = repository
        self.session = session
        self.progress: list[tuple[str, int, int]] = []
        # Nothing runs on the loop, where a gate that is closed would hold up everything.
        config = WorkerConfig(threads_max=1, drain_s_max=drain_s_max, inline_run_us_max=0)
        self.models = ModelTable(config)

    def write(self, built: onnx.ModelProto | bytes, *, version: int = 1, config: str = ALL) -> Path:
        """Version of model "m"."""
        if isinstance(built, bytes):
            path = self.repository / "m" / str(version) / "model.onnx"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(built)
            return path
        return write(self.repository, "m", built, config, version) / str(version) / "model.onnx"

    async def load(self) -> LoadedModel:
        """All versions that are there."""
        folder = scan(self.repository)["m"]
        versions = [(v, folder.path / str(v) / "model.onnx") for v in sorted(folder.versions)]
        config = read_config(folder)
        return await self.models.load(LoadCommand("m", config, tuple(versions)), self._note)

    def _note(self, told: LoadProgress) -> None:
        self.progress.append((told.phase, told.step, told.steps))

    def submit(self, served: ServedVersion) -> "asyncio.Future[Ending]":
        ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        member = self.session.member(served.spec, A)
        call = Call(member, served, lambda _, ending: ended.set_result(ending), arrived_ns=0)
        served.submit(call, flow=0, priority=0, timeout_us=0, now_ns=0)
        return ended

    async def c(self, version: int = 0) -> float:
        """c[0, 0] of the version that is served now."""
        ending = await self.submit(self.models.find("m", version))
        return float(self.session.arrays(ending.outcome)["c"][0, 0])


OpenTable = Callable[..., AbstractAsyncContextManager[Table]]


@pytest.fixture
def open_table(tmp_path: Path, session: Session) -> OpenTable:
    @asynccontextmanager
    async def open_one(**options: float) -> AsyncIterator[Table]:
        table = Table(tmp_path / "repository", session, **options)
        try:
            yield table
        finally:
            for name in {counters.name for counters in table.models.counters()}:
                await table.models.unload(name)

    return open_one


def open_engines(engines: list[WatchedEngine]) -> list[bool]:
    return [not engine.closed.is_set() for engine in engines]


# Finding


async def test_a_model_is_found_by_its_version_or_the_newest(open_table: OpenTable) -> None:
    async with open_table() as table:
        for version in (2, 10, 9):
            table.write(add(version), version=version)
        loaded = await table.load()
        assert loaded.versions == {2: None, 9: None, 10: None}
        assert loaded.in_place == {2: ["a"], 9: ["a"], 10: ["a"]}
        assert {each.name for each in loaded.engines.values()} == {"onnxruntime"}
        assert [await table.c(version) for version in (0, 2, 9, 10)] == [10, 2, 9, 10]


@pytest.mark.parametrize(
    ("name", "version", "kind", "text"),
    [
        ("n", 0, NotFound, "Request for unknown model: 'n' is not found"),
        ("m", 3, NotFound, "Request for unknown model: 'm' version 3 is not found"),
        ("m", -1, InvalidArgument, "a model version is a number above 0, got -1"),
    ],
)
async def test_what_is_not_there_is_not_found(
    open_table: OpenTable, name: str, version: int, kind: type[ThirdrailError], text: str
) -> None:
    async with open_table() as table:
        table.write(add(1))
        await table.load()
        with pytest.raises(kind) as caught:
            table.models.find(name, version)
        assert caught.value.message == text


# Loading


async def test_a_first_load_serves_the_versions_that_can_be(open_table: OpenTable) -> None:
    async with open_table() as table:
        table.write(add(1), version=1)
        table.write(DAMAGED, version=2)
        loaded = await table.load()
        assert loaded.versions[1] is None
        assert "not a readable ONNX file" in str(loaded.versions[2])
        assert await table.c() == 1
        with pytest.raises(NotFound, match="version 2 is not found"):
            table.models.find("m", 2)


async def test_a_first_load_without_any_good_version_leaves_nothing(
    open_table: OpenTable, watched_engines: list[WatchedEngine]
) -> None:
    warm_up_fails = """model_warmup { name: 'w' inputs { key: 'index' value {
        data_type: TYPE_INT64 dims: 1 input_data_file: 'nine' } } }"""
    async with open_table() as table:
        path = table.write(gather(), config=warm_up_fails)
        (path.parents[1] / "warmup").mkdir()
        (path.parents[1] / "warmup" / "nine").write_bytes(np.array([9]).tobytes())
        table.write(DAMAGED, version=2)
        with pytest.raises(ModelFileError, match="not a readable ONNX file"):
            await table.load()  # the newest version's reason
        (path.parents[1] / "2" / "model.onnx").unlink()
        (path.parents[1] / "2").rmdir()
        with pytest.raises(ModelFileError, match=r"warm-up request 'w' failed: .*idx=9"):
            await table.load()
        with pytest.raises(NotFound):
            table.models.find("m", 0)
        assert table.models.counters() == []
    assert open_engines(watched_engines) == [False, False]


async def test_progress_is_told_for_every_version(open_table: OpenTable) -> None:
    async with open_table() as table:
        table.write(add(1), version=1)
        table.write(add(2), version=2)
        await table.load()
        assert table.progress == [
            ("building", 0, 6),
            ("warming up", 2, 6),
            ("building", 3, 6),
            ("warming up", 5, 6),
            ("ready", 6, 6),
        ]


async def test_an_unexpected_failure_leaves_nothing_loaded(
    open_table: OpenTable, watched_engines: list[WatchedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = thirdrail_engines.load

    def load_first_only(path: Path, **options: object) -> object:
        if path.parent.name == "2":
            raise MemoryError
        return load(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(thirdrail_engines, "load", load_first_only)
    async with open_table() as table:
        table.write(add(1), version=1)
        table.write(add(2), version=2)
        with pytest.raises(MemoryError):
            await table.load()
    assert open_engines(watched_engines) == [False]


# Reloading


@pytest.mark.parametrize("config", ["max_batch_size: 3 input { name: 'z' }", ""])
async def test_a_failed_reload_leaves_everything_as_it_was(
    open_table: OpenTable, watched_engines: list[WatchedEngine], config: str
) -> None:
    async with open_table() as table:
        table.write(add(1), version=1)
        await table.load()
        table.write(add(7), version=1, config=config or ALL)
        table.write(add(2) if config else DAMAGED, version=2, config=config or ALL)
        with pytest.raises((RepositoryError, ModelFileError)):
            await table.load()
        assert await table.c() == 1
        assert open_engines(watched_engines)[0]
        assert not any(open_engines(watched_engines)[1:])


async def test_a_reload_swaps_between_two_requests(
    open_table: OpenTable, watched_engines: list[WatchedEngine]
) -> None:
    async with open_table() as table:
        table.write(add(1), version=1)
        await table.load()
        old = table.models.find("m", 0)
        watched_engines[0].gate.clear()
        in_flight = table.submit(old)
        table.write(add(2), version=1)
        await table.load()
        assert await table.c() == 2, "whoever comes now does not wait for the old version"
        assert not in_flight.done()
        watched_engines[0].gate.set()
        ending = await in_flight
        assert table.session.arrays(ending.outcome)["c"][0, 0] == 1
        assert isinstance((await table.submit(old)).outcome.error, Unavailable)
        (counters,) = table.models.counters()
        assert counters.requests_ok == 2, "of both, as one model version"
        await asyncio.to_thread(watched_engines[0].closed.wait, 20)
        assert open_engines(watched_engines) == [False, True]


async def test_a_version_that_is_gone_ends_with_the_reload(
    open_table: OpenTable, watched_engines: list[WatchedEngine]
) -> None:
    async with open_table() as table:
        path = table.write(add(1), version=1)
        table.write(add(2), version=2)
        await table.load()
        path.unlink()
        path.parent.rmdir()
        await table.load()
        with pytest.raises(NotFound):
            table.models.find("m", 1)
        assert await table.c() == 2
        assert [counters.version for counters in table.models.counters()] == [2]


# Unloading


async def test_unloading_during_traffic_finishes_it_and_gives_everything_back(
    open_table: OpenTable, watched_engines: list[WatchedEngine]
) -> None:
    async with open_table() as table:
        table.write(add(1))
        await table.load()
        served = table.models.find("m", 0)
        watched_engines[0].gate.clear()
        calls = [table.submit(served) for _ in range(5)]
        unloading = asyncio.create_task(table.models.unload("m"))
        await asyncio.sleep(0)
        with pytest.raises(NotFound):
            table.models.find("m", 0)
        assert not unloading.done()
        watched_engines[0].gate.set()
        for ending in await asyncio.gather(*calls):
            assert ending.outcome.error is None
        await unloading
        assert open_engines(watched_engines) == [False]
        with pytest.raises(NotFound):
            await table.models.unload("m")


async def test_unloading_does_not_wait_longer_than_its_bound(
    open_table: OpenTable, watched_engines: list[WatchedEngine]
) -> None:
    async with open_table(drain_s_max=0.01) as table:
        table.write(add(1))
        await table.load()
        watched_engines[0].gate.clear()
        call = table.submit(table.models.find("m", 0))
        await table.models.unload("m")
        error = (await call).outcome.error
        assert isinstance(error, Unavailable)
        assert error.message == "model 'm' was unloaded"
        assert table.models.memory().leaving_bytes > 0, "the run is still using it"
        watched_engines[0].gate.set()
        assert await asyncio.to_thread(watched_engines[0].closed.wait, 20)
        async with asyncio.timeout(20):
            while table.models.memory().leaving_bytes:
                await asyncio.sleep(0.001)


async def test_an_unloaded_model_can_be_loaded_again(open_table: OpenTable) -> None:
    async with open_table() as table:
        table.write(add(1))
        await table.load()
        await table.models.unload("m")
        table.write(add(2))
        await table.load()
        assert await table.c() == 2
