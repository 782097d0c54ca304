# SPDX-License-Identifier: Apache-2.0
"""Models that a server compiles when it loads them, and builds as long as a test wants."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import psutil

from support.models import write
from support.server import RunningServer
from thirdrail import Client, ModelStatus

BUILD_PROGRAM = "thirdrail_engines/builds/child.py"
WAIT_S_MAX = 30.0


def parameters(**values: str) -> str:
    """Lines of a config.pbtxt; a key with a dot is written with two underscores."""
    return "".join(
        f'parameters {{ key: "{key.replace("__", ".")}" value {{ string_value: "{value}" }} }}\n'
        for key, value in values.items()
    )


def write_compiled(
    repository: Path, name: str, built: onnx.ModelProto, version: int = 1, **values: str
) -> Path:
    """A model for which ONNX Runtime makes a plan, however small it is."""
    return write(repository, name, built, parameters(keep_optimised="true", **values), version)


def builds_of(server: RunningServer) -> list[psutil.Process]:
    """The processes that build now."""
    found = []
    for child in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if (
                any(BUILD_PROGRAM in word for word in child.cmdline())
                and child.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(child)
    return found


def stopped_build(server: RunningServer) -> psutil.Process:
    """The next build's process, stopped before it can have done anything."""
    ends_s = time.monotonic() + WAIT_S_MAX
    while time.monotonic() < ends_s:
        for build in builds_of(server):
            build.send_signal(signal.SIGSTOP)
            return build
        time.sleep(0.005)
    raise AssertionError(f"nothing was built:\n{server.log_text()}")


@contextlib.contextmanager
def held_build(server: RunningServer) -> Iterator[psutil.Process]:
    """A build that takes as long as the block."""
    build = stopped_build(server)
    try:
        yield build
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            build.send_signal(signal.SIGCONT)


def status_of(client: Client, name: str) -> ModelStatus:
    return next(status for status in client.models() if status.name == name)


def until_ready(client: Client, name: str) -> None:
    client.wait_ready(WAIT_S_MAX, model=name)


def until_engine(client: Client, name: str, engine: str) -> ModelStatus:
    """Wait until this runs it."""
    until_ready(client, name)
    ends_s = time.monotonic() + WAIT_S_MAX
    while time.monotonic() < ends_s:
        status = status_of(client, name)
        if status.is_ready and status.engine == engine and not status.load_phase:
            return status
        time.sleep(0.02)
    raise AssertionError(f"still {status_of(client, name)}")
