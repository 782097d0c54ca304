# SPDX-License-Identifier: Apache-2.0
"""What a server can be asked besides running models; a part of `client.Client`."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from thirdrail import health, models
from thirdrail.connection import Connection
from thirdrail.errors import NotFound, TimedOut, Unavailable
from thirdrail.failures import not_ready, rpc_errors
from thirdrail.models import (
    DescriptionCache,
    ModelChange,
    ModelDescription,
    ModelStatus,
    OnProgress,
)
from thirdrail.v1 import metrics_pb2, models_pb2

ANSWER_SECONDS_MAX = 15.0  # for what a server answers at once, whatever its models do
READY_POLL_SECONDS = 0.05
READY_ANSWER_SECONDS_MAX = 5.0  # then it is asked again


def ready_answer_seconds(deadline: float) -> float:
    """How long to wait for one answer. A second at least: a busy server is no silent one."""
    return min(max(1.0, deadline - time.monotonic()), READY_ANSWER_SECONDS_MAX)


class ServerCalls(ABC):
    """Every method raises the exceptions of `thirdrail.errors`. Loads and unloads take as long as
    they take; of all else TimedOut is raised where a server stands still.
    """

    _descriptions: DescriptionCache

    @abstractmethod
    def _connected(self) -> Connection: ...

    def models(self, *, ready_only: bool = False) -> list[ModelStatus]:
        """The state of every version of every model."""
        connection = self._connected()
        request = models_pb2.ListRequest(ready_only=ready_only)
        with rpc_errors(connection.address, ANSWER_SECONDS_MAX):
            response = connection.models.List(request, timeout=ANSWER_SECONDS_MAX)
        return [models.status_of_message(status) for status in response.models]

    def describe(self, model: str, *, version: int = 0) -> ModelDescription:
        """A model's inputs, outputs and configuration; of the newest ready version by default."""
        return self._describe(model, version, ANSWER_SECONDS_MAX)

    def _describe(self, model: str, version: int, timeout: float | None) -> ModelDescription:
        connection = self._connected()
        request = models.describe_request(model, version)
        with rpc_errors(connection.address, timeout):
            response = connection.models.Describe(request, timeout=timeout)
        return models.description_of_message(response)

    def load(
        self, model: str, *, config_pbtxt: str = "", progress: OnProgress | None = None
    ) -> list[int]:
        """Loads or reloads a model and returns its ready versions. `progress` hears of each step.

        config_pbtxt: used in place of the repository's.
        """
        connection = self._connected()
        versions: list[int] = []
        request = models_pb2.LoadRequest(name=model, config_pbtxt=config_pbtxt)
        with rpc_errors(connection.address):
            for message in connection.models.Load(request):
                if progress is not None:
                    progress(models.progress_of_message(message))
                versions.extend(message.versions)
        self._descriptions = DescriptionCache()  # it may declare something else now
        return versions

    def unload(self, model: str) -> None:
        """Unloads a model; requests that are running finish first."""
        connection = self._connected()
        with rpc_errors(connection.address):
            connection.models.Unload(models_pb2.UnloadRequest(name=model))

    def watch(self, *names: str) -> Iterator[ModelChange]:
        """The state of every version now, then each change, until the iterator is closed."""
        connection = self._connected()
        with rpc_errors(connection.address):
            call: Any = connection.models.Watch(models_pb2.WatchRequest(names=names))
        try:
            with rpc_errors(connection.address):
                for message in call:
                    yield models.change_of_message(message)
        finally:
            call.cancel()

    def health(self, model: str = "") -> bool:
        """Whether the server, or a model, can serve now. Raises NotFound for an unknown model."""
        return self._is_serving(model, ANSWER_SECONDS_MAX)

    def _is_serving(self, model: str, timeout: float | None) -> bool:
        connection = self._connected()
        with rpc_errors(connection.address, timeout):
            return bool(connection.check(model, timeout=timeout) == health.SERVING)

    def metrics(self) -> str:
        """The server's metrics as Prometheus text."""
        connection = self._connected()
        request = metrics_pb2.ScrapeRequest()
        with rpc_errors(connection.address, ANSWER_SECONDS_MAX):
            return connection.metrics.Scrape(request, timeout=ANSWER_SECONDS_MAX).text

    def snapshot(self) -> metrics_pb2.SnapshotResponse:
        """The same figures as numbers: sums since the server started, and its workers."""
        connection = self._connected()
        request = metrics_pb2.SnapshotRequest()
        with rpc_errors(connection.address, ANSWER_SECONDS_MAX):
            return connection.metrics.Snapshot(request, timeout=ANSWER_SECONDS_MAX)

    def wait_ready(self, timeout: float = 60.0, *, model: str = "") -> None:
        """Waits until the server, or a model, can serve; also for one that is yet to be started.

        timeout: seconds. Raises TimedOut with the last reason.
        """
        deadline = time.monotonic() + timeout
        while (fault := self._ready_fault(model, deadline)) is not None:
            if time.monotonic() >= deadline:
                raise not_ready(timeout, fault)
            time.sleep(READY_POLL_SECONDS)

    def _ready_fault(self, model: str, deadline: float) -> str | None:
        try:
            is_serving = self._is_serving(model, ready_answer_seconds(deadline))
            return None if is_serving else "it says that it is not serving"
        except (Unavailable, NotFound, TimedOut) as error:
            return str(error)
