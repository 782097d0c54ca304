# SPDX-License-Identifier: Apache-2.0
"""Model versions prepared as the worker prepares them, and sessions that use them."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

import thirdrail_engines
from support.engines import WatchedEngine
from support.models import write
from support.served import WAIT_S_MAX, Served
from support.sessions import Session
from thirdrail_engines import EngineOptions, Inspector, LoadedEngine
from thirdrail_engines.plans import TellProgress
from thirdrail_server.config import WorkerConfig
from thirdrail_server.control_messages import LoadCommand
from thirdrail_server.front.control.load_source import LoadSource, prepare
from thirdrail_server.worker.loading import PreparedVersion, prepare_version
from thirdrail_server.worker.run_place import RunPlace

Prepare = Callable[..., PreparedVersion]
OpenSession = Callable[..., Session]


@pytest.fixture
def watched_engines(monkeypatch: pytest.MonkeyPatch) -> list[WatchedEngine]:
    """All engines that are loaded from now on, in that order."""
    engines: list[WatchedEngine] = []
    load = thirdrail_engines.load

    def load_watched(path: Path, *, options: EngineOptions, **more: Any) -> LoadedEngine:
        loaded = load(path, options=options, **more)
        engines.append(WatchedEngine(loaded.engine, options))
        return LoadedEngine(engines[-1], loaded.report)

    monkeypatch.setattr(thirdrail_engines, "load", load_watched)
    return engines


@pytest.fixture(scope="session")
def inspector() -> Iterator[Inspector]:
    with Inspector() as shared:
        yield shared


@pytest.fixture
def prepare_model(tmp_path: Path, inspector: Inspector) -> Iterator[Prepare]:
    """prepare_model(built, config="", files={}, **settings of the worker): a version, ready to
    run."""
    prepared: list[PreparedVersion] = []

    def prepare_one(
        built: onnx.ModelProto,
        config: str = "",
        *,
        cores: int = 1,
        files: Mapping[str, str] | None = None,
        tell: TellProgress = lambda phase, step, steps: None,
        **settings: Any,
    ) -> PreparedVersion:
        name = f"m{len(prepared)}"
        folder = write(tmp_path, name, built, config)
        for filename, text in (files or {}).items():
            (folder / filename).write_text(text)
        command = command_of(name, tmp_path)
        version, path = command.versions[0]
        prepared.append(
            prepare_version(
                name,
                version,
                path,
                command.config,
                WorkerConfig(**settings),
                cores,
                inspector,
                tell,
            )
        )
        return prepared[-1]

    yield prepare_one
    for each in prepared:
        each.engine.close()


@pytest.fixture
def open_session() -> Iterator[OpenSession]:
    """open_session(...) -> a Session, closed at the test's end."""
    sessions: list[Session] = []

    def open_one(**fields: Any) -> Session:
        sessions.append(Session(**fields))
        return sessions[-1]

    yield open_one
    for session in sessions:
        session.close()


@pytest.fixture
def session(open_session: OpenSession) -> Session:
    return open_session()


def command_of(name: str, repository: Path) -> LoadCommand:
    """What the front would tell a worker to load."""
    return prepare(name, LoadSource(repository)).command


@pytest.fixture
def serving(prepare_model: Prepare, session: Session) -> Callable[..., Any]:
    """async with serving(model, config, place) as served: everything is closed at its end."""

    @contextlib.asynccontextmanager
    async def serve(
        built: Any, config: str = "", place: RunPlace | None = None
    ) -> AsyncIterator[Served]:
        served = Served(prepare_model(built, config), session, place)
        try:
            yield served
        finally:
            served.engine.gate.set()
            if not served.engine.closed.is_set():
                await served.version.retire("the test is over", WAIT_S_MAX)
        assert served.session.output.leased_bytes == 0

    return serve
