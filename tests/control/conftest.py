# SPDX-License-Identifier: Apache-2.0
"""For these tests: model repositories, and a control plane with a real process."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from thirdrail_server.config import ControlLimits, ModelControlMode, ServerConfig
from thirdrail_server.control_channel import ChannelLimits
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.control.model_control import ModelControl
from thirdrail_server.front.control.served_model import READY, UNAVAILABLE
from thirdrail_server.front.control.supervisor import Supervisor
from thirdrail_server.front.control.worker_process import start_worker
from thirdrail_server.repository.device_choice import CPU

WORKER = (sys.executable, str(Path(__file__).with_name("worker_child.py")))
LIMITS = ControlLimits(restart_delay_ms_min=1, restart_delay_ms_max=50, worker_stop_s_max=5)


class Lane:
    """The front's lane as far as the supervisor knows it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.closed_because: str | None = None
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def close(self, reason: str) -> None:
        self._sock.close()
        self.closed_because = reason
        if not self.closed.done():
            self.closed.set_result(reason)


@dataclass(slots=True)
class Plane:
    config: ServerConfig
    catalog: Catalog
    control: ModelControl
    worker: Supervisor
    lanes: list[Lane]

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for a change of the catalog after which `is_so`. Bounded by the test's timeout."""
        with self.catalog.subscribe() as changes:
            while not is_so():
                await anext(changes)

    def is_settled(self) -> bool:
        """Nothing is being loaded or unloaded."""
        ended = {READY, UNAVAILABLE}
        return all(v.state in ended for model in self.catalog.models() for v in model.versions)

    def reason(self, name: str) -> str:
        model = self.catalog.get(name)
        return model.versions[-1].reason if model else ""

    async def kill_worker(self) -> None:
        """And wait until everybody knows."""
        assert self.worker._life is not None
        life = self.worker._life
        life.process.kill()
        await asyncio.shield(life.death)


class Repository:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def write(self, name: str, content: str = "ok", version: int = 1, config: str = "") -> None:
        """content: what worker_child.py does when it loads the model."""
        folder = self.path / name / str(version)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx").write_text(content)
        if config:
            (self.path / name / "config.pbtxt").write_text(config)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


OpenPlane = Callable[..., AbstractAsyncContextManager[Plane]]


@pytest.fixture
def open_plane(repository: Repository) -> OpenPlane:
    """`async with open_plane(model_control="explicit") as plane`: started, with its worker."""

    @contextlib.asynccontextmanager
    async def opened(
        *, model_control: str = "none", arguments: tuple[str, ...] = (), **settings: Any
    ) -> AsyncIterator[Plane]:
        settings.setdefault("control", LIMITS)
        config = ServerConfig(
            repository.path, model_control=ModelControlMode(model_control), **settings
        )
        catalog = Catalog(config.control.models_max, config.control.watchers_max)
        lanes: list[Lane] = []

        async def attach(sock: socket.socket) -> Lane:
            lanes.append(Lane(sock))
            return lanes[-1]

        worker = Supervisor(
            "cpu", lambda: start_worker(arguments, WORKER), attach, config.control, ChannelLimits()
        )
        control = ModelControl(config, catalog, {CPU: worker})
        (models,) = control.workers
        models.start()
        try:
            await control.start()
            yield Plane(config, catalog, control, worker, lanes)
        finally:
            catalog.begin_stop()
            await control.stop()
            await worker.stop()

    return opened
