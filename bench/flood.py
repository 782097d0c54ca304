# SPDX-License-Identifier: Apache-2.0
"""A client in a process of its own that keeps many small calls in flight without a pause."""

import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

from bench import models
from bench.lane_load import windowed
from thirdrail import Client

_SPAWN = multiprocessing.get_context("spawn")
_SLICE_S = 0.05  # between two looks at whether to go on


class Flood:
    """A flooding client that can be switched on and off. Use `flood(...)`."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        self._pipe.send(True)
        self._pipe.recv()  # it has begun
        try:
            yield
        finally:
            self._pipe.send(False)
            self._pipe.recv()


@contextlib.contextmanager
def flood(url: str, in_flight: int) -> Iterator[Flood]:
    """A process that calls `identity` of the server at this address."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_run, args=(theirs, url, in_flight), daemon=True)
    process.start()
    theirs.close()
    ours.recv()  # attached
    try:
        yield Flood(ours)
    finally:
        ours.close()
        process.join()


def _run(pipe: Connection, url: str, in_flight: int) -> None:
    inputs = {"x": models.floats(64)}
    with Client(url, transport="lane") as client, contextlib.suppress(EOFError):
        client.infer("identity", inputs)
        call = windowed(client, "identity", inputs, in_flight)
        pipe.send(True)
        while pipe.recv():
            call(_SLICE_S)
            pipe.send(True)
            while not pipe.poll():
                call(_SLICE_S)
            pipe.recv()
            pipe.send(True)
