# SPDX-License-Identifier: Apache-2.0
"""What the servicer needs of the rest of the front."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from thirdrail.v1 import inference_pb2, metrics_pb2
from thirdrail_server.inference import grpc_service_pb2 as kserve


class Result(Protocol):
    @property
    def response(self) -> inference_pb2.InferResponse: ...
    @property
    def data(self) -> Sequence[memoryview | bytes | None]: ...
    def release(self) -> None: ...


class Dispatcher(Protocol):
    async def infer(
        self, request: inference_pb2.InferRequest, data: Sequence[bytes | None], *, flow: int
    ) -> Result: ...


class Control(Protocol):
    async def load(
        self,
        name: str,
        config: kserve.ModelConfig | None,
        files: Mapping[str, bytes],
        progress: Callable[[str, int, int], None],
    ) -> list[int]: ...
    async def unload(self, name: str) -> None: ...
    async def counters(self) -> list[metrics_pb2.ModelCounters]: ...
