# SPDX-License-Identifier: Apache-2.0
"""Services that hand a tensor on, for tests to kill: each does what it is asked over its pipe."""

from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from thirdrail import Client, ThirdrailError
from thirdrail.tensors import Array


def serve_steps(pipe: Connection, url: str) -> None:
    """Answers (step, argument) with what the step returns, or with the name of its error."""
    service = _Service(Client(url, transport="lane"))
    while True:
        step, argument = pipe.recv()
        try:
            pipe.send(getattr(service, step)(argument))
        except ThirdrailError as error:
            pipe.send(type(error).__name__)


class _Service:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._kept: list[Any] = []
        self._exports: list[Any] = []
        self._received: list[Any] = []

    def export_filled(self, value: float) -> tuple[str, int]:
        """A new tensor, offered where it lies: the token and the copies made."""
        array = self._client.empty(1 << 18, shared=True)
        array[:] = value
        self._kept.append(array)
        return self._export(array)

    def export_result(self, value: float) -> tuple[str, int]:
        result = self._client.infer("identity", np.full(1 << 18, value, np.float32), borrow=True)
        self._kept.append(result)
        return self._export(result["y"])

    def export_received(self, _: None) -> tuple[str, int]:
        return self._export(self._received[-1])

    def receive(self, token: str) -> bool:
        self._received.append(self._client.receive(token))
        return True

    def read(self, _: None) -> tuple[float, bool]:
        """What was received: its first value, and whether all are the same."""
        array: Array = np.asarray(self._received[-1])
        return float(array[0]), bool((array == array[0]).all())

    def infer(self, _: None) -> float:
        """What a model makes of it, without a copy of the client's."""
        result = self._client.infer("identity", self._received[-1])
        return float(result["y"][0])

    def release(self, _: None) -> bool:
        self._received.pop().release()
        return True

    def revoke(self, _: None) -> bool:
        self._exports[-1].revoke()
        return True

    def _export(self, tensor: Any) -> tuple[str, int]:
        export = self._client.export(tensor)
        self._exports.append(export)
        return export.token, export.copies
