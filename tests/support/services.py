# SPDX-License-Identifier: Apache-2.0
"""A service in a process of its own that hands tensors over, as a test tells it to."""

import gc
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from support.killable import Killable
from thirdrail import Client, ThirdrailError
from thirdrail.lane.blocking_exports import Export
from thirdrail.lane.exports import SharedTensor
from thirdrail.tensors import Array


def pattern(size: int) -> Array:
    """`size` numbers that look like no others."""
    return np.arange(size, dtype=np.float32) * np.float32(0.5) + np.float32(size)


def serve(pipe: Connection, url: str) -> None:
    """Answers (method, arguments...) with a value, or with an error's name and text."""
    service = _Service(url)
    while True:
        method, *arguments = pipe.recv()
        try:
            pipe.send(("", getattr(service, method)(*arguments)))
        except ThirdrailError as error:
            pipe.send((type(error).__name__, str(error)))


class _Service:
    def __init__(self, url: str) -> None:
        self._client = Client(url)
        self._page: Array | None = None
        self._exports: list[Export] = []
        self._received: list[SharedTensor] = []

    def attach(self) -> str:
        self._client.infer("identity", np.zeros(1, np.float32))
        return self._client.transport.name

    def fill(self, size: int) -> None:
        """The page that `export` exports."""
        self._page = self._client.empty(size, shared=True)
        self._page[:] = pattern(size)

    def fill_by_model(self, size: int) -> None:
        """The same as a result."""
        self._page = self._client.infer("identity", pattern(size), borrow=True)["y"]

    def export(self) -> str:
        self._exports.append(self._client.export(self._page))
        return self._exports[-1].token

    def revoke(self) -> None:
        self._exports[-1].revoke()

    def forget_page(self) -> None:
        self._page = None

    def receive(self, token: str) -> None:
        self._received.append(self._client.receive(token))

    def hand_on(self) -> str:
        self._exports.append(self._client.export(self._received[-1]))
        return self._exports[-1].token

    def read(self) -> bool:
        """Whether the received tensor holds what it must."""
        array = self._received[-1].array
        return bool(np.array_equal(array, pattern(array.size)))

    def infer(self) -> bool:
        """Whether a model gets from it what it must."""
        tensor = self._received[-1]
        answer = self._client.infer("identity", tensor)["y"]
        return bool(np.array_equal(answer, pattern(tensor.nbytes // 4)))

    def infer_page(self) -> bool:
        """The same for the exporter's own."""
        assert self._page is not None
        answer = self._client.infer("identity", self._page)["y"]
        return bool(np.array_equal(answer, pattern(self._page.size)))

    def release(self) -> None:
        self._received.pop().release()
        gc.collect()  # caught errors have frames, which have arrays


class Service(Killable):
    """Told what to do by a test."""

    def __init__(self, url: str) -> None:
        super().__init__(serve, url)

    def do(self, method: str, *arguments: Any) -> Any:
        """Raises Refused with the error's name and text."""
        error, value = self.ask((method, *arguments))
        if error:
            raise Refused(error, value)
        return value

    def begin(self, method: str, *arguments: Any) -> None:
        """Nobody waits for the answer."""
        self.pipe.send((method, *arguments))


class Refused(Exception):
    """What a service could not do."""
