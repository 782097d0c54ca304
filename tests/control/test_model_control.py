# SPDX-License-Identifier: Apache-2.0
"""Loading and unloading with real files and a real worker process."""

import asyncio
import logging
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from thirdrail.errors import Internal, InvalidArgument, NotFound, ResourceExhausted
from thirdrail_server.config import CompileConfig, ControlLimits, MemoryBudget, WorkerConfig
from thirdrail_server.control_messages import LoadProgress
from thirdrail_server.front.control.access import ControlIsOff
from thirdrail_server.front.control.catalog import RELOAD_FAILED
from thirdrail_server.front.control.uploads import Uploads
from thirdrail_server.front.statuses import INTERNAL_TEXT
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.errors import RepositoryError

EXPLICIT: dict[str, Any] = {"model_control": "explicit"}


async def test_startup_loads_every_model_and_a_broken_one_stops_no_other(
    repository: Any, open_plane: Any
) -> None:
    repository.write("good")
    repository.write("bad", "bad")
    repository.write("buggy", "bug")
    repository.write("badconfig", config="max_batch_size: many")
    (repository.path / "empty").mkdir()
    async with open_plane() as plane:
        await plane.until(plane.is_settled)
        assert plane.reason("bad") == "the file is damaged"
        assert "secret" not in plane.reason("buggy")
        assert "max_batch_size" in plane.reason("badconfig")
        assert "no version folder" in plane.reason("empty")
        assert plane.catalog.find("good")[0].config.max_batch_size == 4
        assert not plane.catalog.all_ready()
        (lane,) = plane.lanes
    assert lane.closed_because is not None


async def test_a_load_that_fails_by_our_own_fault_ends_and_is_told(
    repository: Any, open_plane: Any, caplog: pytest.LogCaptureFixture
) -> None:
    repository.write("odd", "odd")
    async with open_plane(**EXPLICIT, load_models=("odd",)) as plane:
        await plane.until(plane.is_settled)
        assert plane.reason("odd") == INTERNAL_TEXT
        with pytest.raises(Internal, match=f"failed to load 'odd': {INTERNAL_TEXT}"):
            await plane.control.load("odd")
        repository.write("odd", "ok")
        assert await plane.control.load("odd") == [1]
    assert "ValueError" in caplog.text


async def test_a_missing_repository_is_told_at_once(repository: Any, open_plane: Any) -> None:
    repository.path.rmdir()
    with pytest.raises(RepositoryError, match="cannot be read"):
        async with open_plane():
            pass


async def test_what_a_load_has_reservations_about_is_logged_once(
    repository: Any, open_plane: Any, caplog: pytest.LogCaptureFixture
) -> None:
    repository.write("m")
    repository.write("m", version=2)
    async with open_plane() as plane:
        await plane.until(plane.catalog.all_ready)
        async with asyncio.timeout(30):
            while "model 'm': " not in caplog.text:
                await asyncio.sleep(0.005)
    assert caplog.text.count("model 'm': a field has no effect") == 1


async def test_explicit_mode_loads_what_is_asked_for(repository: Any, open_plane: Any) -> None:
    repository.write("a")
    repository.write("b")
    async with open_plane(load_models=("a",), **EXPLICIT) as plane:
        await plane.until(plane.catalog.all_ready)
        assert plane.reason("b") == "not loaded"
        told: list[LoadProgress] = []
        assert await plane.control.load("b", None, {}, told.append) == [1]
        assert told == [LoadProgress("reading"), LoadProgress("building", 1, 2)]
        await plane.control.unload("b")
        assert not plane.catalog.is_ready("b")
        await plane.control.unload("b")
        with pytest.raises(NotFound, match="'c' is not found"):
            await plane.control.unload("c")


async def test_explicit_mode_refuses_a_startup_model_that_is_not_there(
    repository: Any, open_plane: Any
) -> None:
    repository.write("a")
    with pytest.raises(RepositoryError, match="no model 'b'"):
        async with open_plane(load_models=("a", "b"), **EXPLICIT):
            pass


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("none", "model control is off; start the server with --model-control explicit"),
        ("poll", "explicit model load / unload is not allowed if polling is enabled"),
    ],
)
async def test_other_modes_refuse_control(
    repository: Any, open_plane: Any, mode: str, text: str
) -> None:
    repository.write("a")
    async with open_plane(model_control=mode) as plane:
        with pytest.raises(ControlIsOff, match=text):
            await plane.control.load("a")
        with pytest.raises(ControlIsOff, match=text):
            await plane.control.unload("a")


async def test_load_failures_say_what_failed(repository: Any, open_plane: Any) -> None:
    repository.write("bad", "bad")
    repository.write("all", config="version_policy { specific { versions: [5] } }")
    async with open_plane(**EXPLICIT) as plane:
        await plane.worker.wait_until_up()
        with pytest.raises(NotFound, match="the repository has no folder 'x'"):
            await plane.control.load("x")
        assert plane.catalog.get("x") is None, "a name that nobody knows leaves no trace"
        with pytest.raises(Internal, match="failed to load 'bad', no version is available"):
            await plane.control.load("bad")
        with pytest.raises(Internal, match="version 5: version_policy names it"):
            await plane.control.load("all")


async def test_a_failed_reload_leaves_the_old_one_serving(repository: Any, open_plane: Any) -> None:
    repository.write("m")
    async with open_plane(load_models=("m",), **EXPLICIT) as plane:
        await plane.until(plane.catalog.all_ready)
        repository.write("m", "bad")
        with pytest.raises(Internal, match="the file is damaged"):
            await plane.control.load("m")
        model, _ = plane.catalog.find("m")
        assert f"{RELOAD_FAILED}: the file is damaged" in model.warnings


async def test_loads_of_one_model_take_turns_and_the_line_is_bounded(
    repository: Any, open_plane: Any
) -> None:
    repository.write("m", "slow")
    limits = ControlLimits(waiting_per_model_max=1)
    async with open_plane(control=limits, **EXPLICIT) as plane:
        await plane.worker.wait_until_up()
        loads = [asyncio.create_task(plane.control.load("m")) for _ in range(3)]
        outcomes = await asyncio.gather(*loads, return_exceptions=True)
    assert outcomes[:2] == [[1], [1]]
    assert isinstance(outcomes[2], ResourceExhausted)


async def test_a_load_goes_on_when_its_caller_gives_up(repository: Any, open_plane: Any) -> None:
    repository.write("m", "slow")
    async with open_plane(**EXPLICIT) as plane:
        await plane.worker.wait_until_up()
        load = asyncio.create_task(plane.control.load("m"))
        await plane.until(lambda: plane.reason("m") == "loading")
        load.cancel()
        await plane.until(lambda: plane.catalog.is_ready("m"))


async def test_stopping_in_the_middle_of_a_load_leaves_no_process(
    repository: Any, open_plane: Any
) -> None:
    repository.write("m", "forever")
    async with open_plane() as plane:
        await plane.until(lambda: plane.reason("m") == "loading")
        pid = (await plane.worker.status()).pid
    assert not psutil.pid_exists(pid)


async def test_files_that_change_during_a_load_are_loaded_once_more_and_not_more_often(
    repository: Any, open_plane: Any
) -> None:
    repository.write("m", "forever")
    async with open_plane(model_control="poll", poll_interval_s=3600) as plane:
        await plane.until(lambda: plane.reason("m") == "loading")
        next_load = asyncio.create_task(plane.control._reload("m"))
        await asyncio.sleep(0)
        for _ in range(9):
            await plane.control._reload("m")
        assert not next_load.done()


async def test_poll_mode_follows_the_repository(repository: Any, open_plane: Any) -> None:
    repository.write("stays")
    repository.write("goes")
    async with open_plane(model_control="poll", poll_interval_s=0.02) as plane:
        await plane.until(plane.catalog.all_ready)
        repository.write("new")
        (repository.path / "goes" / "1" / "model.onnx").unlink()
        (repository.path / "goes" / "1").rmdir()
        (repository.path / "goes").rmdir()
        repository.write("stays", version=2)
        await plane.until(
            lambda: (
                plane.catalog.get("goes") is None
                and plane.catalog.is_ready("new")
                and plane.catalog.is_ready("stays", 2)
            )
        )
        assert plane.catalog.find("stays")[1] == 2
        assert plane.catalog.all_ready()


async def test_a_repository_that_is_away_is_told_once_and_that_it_is_back(
    repository: Any, open_plane: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    repository.write("m")
    caplog.set_level(logging.INFO)

    async def until_told(text: str) -> None:
        while text not in caplog.text:
            await asyncio.sleep(0.005)

    async with open_plane(model_control="poll", poll_interval_s=0.005) as plane:
        await plane.until(plane.catalog.all_ready)
        repository.path.rename(tmp_path / "away")
        await until_told("polling goes on")
        await asyncio.sleep(0.05)  # some looks more
        (tmp_path / "away").rename(repository.path)
        await until_told("can be read again")
        assert plane.catalog.all_ready()
    assert caplog.text.count("polling goes on") == 1


async def test_uploaded_files_serve_and_survive_the_worker(
    repository: Any, open_plane: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    repository.write("m")
    config = ModelConfig(name="m", max_batch_size=2)
    async with open_plane(**EXPLICIT) as plane:
        await plane.worker.wait_until_up()
        files = {"3/model.onnx": b"ok", "labels.txt": b"cat"}
        assert await plane.control.load("m", config, files) == [3]
        assert plane.catalog.find("m")[0].config.max_batch_size == 2
        await plane.kill_worker()
        await plane.until(lambda: plane.catalog.is_ready("m", 3))
        with pytest.raises(InvalidArgument, match="need a configuration"):
            await plane.control.load("m", None, files)
        assert len(stored_uploads(tmp_path)) == 1
        with pytest.raises(Internal, match="the file is damaged"):
            await plane.control.load("m", config, {"4/model.onnx": b"bad"})
        assert len(stored_uploads(tmp_path)) == 1
        assert await plane.control.load("m") == [1]
        assert stored_uploads(tmp_path) == []
        await plane.control.load("m", config, files)
        await plane.control.unload("m")
        assert stored_uploads(tmp_path) == []
    assert list(tmp_path.iterdir()) == [repository.path]


async def test_uploaded_files_of_a_caller_who_hangs_up_serve_all_the_same(
    repository: Any, open_plane: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    is_storing, may_go_on = threading.Event(), threading.Event()
    store = Uploads.store

    def store_later(self: Uploads, name: str, files: Mapping[str, bytes]) -> Path:
        is_storing.set()
        may_go_on.wait()
        return store(self, name, files)

    monkeypatch.setattr(Uploads, "store", store_later)
    async with open_plane(**EXPLICIT) as plane:
        await plane.worker.wait_until_up()
        files = {"1/model.onnx": b"ok"}
        load = asyncio.create_task(plane.control.load("m", ModelConfig(name="m"), files))
        await asyncio.to_thread(is_storing.wait)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        may_go_on.set()
        await plane.until(lambda: plane.catalog.is_ready("m"))
        assert len(stored_uploads(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == [repository.path]


def stored_uploads(temporary: Path) -> list[Path]:
    return [path for path in temporary.glob("thirdrail-uploads-*/*") if path.is_dir()]


async def test_a_better_engine_that_waits_for_its_turn_is_forgotten_with_the_worker(
    repository: Any, open_plane: Any
) -> None:
    """The model serves again at once, from the engine that needs no build."""
    names = ("a", "b", "c")
    for name in names:
        repository.write(name, "stopgap")
    one_at_a_time = WorkerConfig(loads_at_once_max=1, compiling=CompileConfig(loads_at_once_max=1))
    async with open_plane(worker=one_at_a_time) as plane:
        # Two builds go on for ever, and the third waits to begin.
        await plane.until(plane.catalog.all_ready)
        async with asyncio.timeout(60):
            await plane.kill_worker()
            await plane.until(lambda: plane.catalog.is_ready("c"))


async def test_an_unload_before_the_worker_knows_of_a_build_ends_it(
    repository: Any, open_plane: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While room is made for the better engine, there is nothing yet that a worker could cancel."""
    repository.write("m", "stopgap")
    settings = {"load_models": ("m",), "memory": MemoryBudget(bytes_max=1 << 30), **EXPLICIT}
    async with open_plane(**settings) as plane:
        call, is_asked, may_answer = plane.worker.call, asyncio.Event(), asyncio.Event()

        async def held(do: str, *rest: Any) -> Any:
            if do == "memory" and plane.catalog.is_ready("m"):
                is_asked.set()
                await may_answer.wait()
            elif do == "cancel loads":
                may_answer.set()
            return await call(do, *rest)

        monkeypatch.setattr(plane.worker, "call", held)
        async with asyncio.timeout(60):
            await is_asked.wait()
            await plane.control.unload("m")
        assert plane.reason("m") == "unloaded"
