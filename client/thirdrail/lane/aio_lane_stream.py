# SPDX-License-Identifier: Apache-2.0
"""Many requests at once for asyncio, over the lane where it is there when the stream is entered."""

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from thirdrail.aio_stream import AsyncStream, AsyncWrite, all_ended
from thirdrail.errors import FailedPrecondition, Unavailable
from thirdrail.failures import anew
from thirdrail.lane.aio_access import AsyncAccess
from thirdrail.requests import InferOptions, Inputs, Result
from thirdrail.stream import IN_FLIGHT_MAX, stream_ended

if TYPE_CHECKING:  # the stub exists for the type checker only; the session needs Linux
    from thirdrail.lane.aio_session import AsyncSession
    from thirdrail.v1.inference_pb2_grpc import InferenceAsyncStub

InferOnLane = Callable[["AsyncSession", str, Inputs, InferOptions], Awaitable[Result]]


class AsyncLaneStream(AsyncStream):
    """Stays on the session that it began with, and fails when that ends."""

    def __init__(
        self,
        access: AsyncAccess,
        infer: InferOnLane,
        inference: "InferenceAsyncStub",
        write: AsyncWrite,
        *,
        address: str,
        in_flight_max: int = IN_FLIGHT_MAX,
    ) -> None:
        super().__init__(inference, write, address=address, in_flight_max=in_flight_max)
        self._access = access
        self._infer_on_lane = infer
        self._session: AsyncSession | None = None

    async def __aenter__(self) -> Self:
        self._session = await self._access.session()
        if self._session is None:
            return await super().__aenter__()
        self._fault = None
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is None:
            return await super().__aexit__(kind, error, trace)
        try:
            if kind is None:
                await all_ended(self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            self._fault = FailedPrecondition("the stream is closed")
            await all_ended(self._tasks)

    async def _infer(self, model: str, inputs: Inputs, options: InferOptions) -> Result:
        session = self._session
        if session is None:
            return await super()._infer(model, inputs, options)
        async with self._room:
            if self._fault is None and session.is_closed:
                self._fault = stream_ended(Unavailable(session.closed.result()))
            if self._fault is not None:
                raise anew(self._fault)
            return await self._infer_on_lane(session, model, inputs, options)

    def __repr__(self) -> str:
        if self._session is None:
            return super().__repr__()
        state = "closed" if self._fault else "open"
        return f"<AsyncStream on the lane {state}, {len(self._tasks)} in flight>"
