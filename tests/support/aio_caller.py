# SPDX-License-Identifier: Apache-2.0
"""The session of AsyncClient as a way in for the conformance suite, below its arrays, so that
requests can be wrong."""

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np

from support.callers import (
    INLINE_BYTES_MAX,
    Ask,
    Failure,
    Outcome,
    Pending,
    native_outcome,
    native_request,
)
from support.worker import RunningWorker
from thirdrail.errors import ThirdrailError
from thirdrail.lane.aio_session import AsyncSession
from thirdrail.lane.encoding import Encoder, LargeInput
from thirdrail.lane.places import Place
from thirdrail.lane.results import release_outputs
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2, metrics_pb2


class _Session(AsyncSession):
    """Results are what came, before it is made into arrays."""

    async def _result(
        self, response: inference_pb2.InferResponse, places: list[Place], *, borrow: bool
    ) -> Any:
        memory = self._memory
        data = [
            memory.output_bytes(tensor.ref).tobytes() if tensor.HasField("ref") else None
            for tensor in response.outputs
        ]
        release_outputs(response, memory)
        self._leave(places)
        return native_outcome(response, data)


class _Prepared(Encoder):
    """Inputs that are encoded already."""

    def __init__(self, large: list[LargeInput]) -> None:
        super().__init__()
        self._large = large

    def inputs(
        self, arrays: Mapping[str, Array], inline_bytes_max: int
    ) -> tuple[list[bytes], list[LargeInput]]:
        return [], self._large


class OverAsyncSession:
    is_kserve = False

    def __init__(self, worker: RunningWorker) -> None:
        self._worker = worker
        self._session = worker.run(_Session.open(worker.sockets.pop(0), b"", "conformance"))

    def submit(self, ask: Ask) -> Pending:
        future = asyncio.run_coroutine_threadsafe(self._call(ask), self._worker.loop)
        return Pending(future, future.cancel)

    async def _call(self, ask: Ask) -> Outcome:
        request = native_request(ask)
        large: list[LargeInput] = []
        for tensor in list(request.inputs):
            if len(tensor.raw) > INLINE_BYTES_MAX:
                raw = np.frombuffer(tensor.raw, np.uint8)
                tensor.ClearField("raw")
                large.append(LargeInput(tensor.name, tensor.SerializeToString(), raw))
                request.inputs.remove(tensor)
        body, encoder = request.SerializeToString(), _Prepared(large)
        try:
            outcome: Any = await self._session.infer(body, {}, encoder, borrow=False)
        except ThirdrailError as error:
            return Failure(error.message, reason=error.reason)
        assert isinstance(outcome, Outcome)
        return outcome

    def counters(self, model: str) -> metrics_pb2.ModelCounters:
        return self._worker.counters()[model]

    def close(self) -> None:
        self._worker.loop.call_soon_threadsafe(self._session.leave)
