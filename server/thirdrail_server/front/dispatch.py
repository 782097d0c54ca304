# SPDX-License-Identifier: Apache-2.0
"""From a protocol's servicer to the worker and back: the front as a client of its own lane.

Nothing about a request is validated here that the worker relies on. A request that cannot reach a
worker fails at once, in the same form as one that the worker refused.
"""

import logging
from collections.abc import Callable, Sequence

from thirdrail.errors import InvalidArgument, NotFound, ThirdrailError, Unavailable
from thirdrail.lane.aio import AsyncLane, Reply
from thirdrail.lane.input_arena import Piece
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.front.control.catalog import Catalog

Result = Reply
Cancel = Callable[[], object]

log = logging.getLogger(__name__)


class Dispatcher:
    """The way to the models, for all protocols. Workers may come and go."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._lanes: dict[str, AsyncLane] = {}  # by worker
        self._only_lane: AsyncLane | None = None  # with one worker there is nothing to look up

    def attach(self, lane: AsyncLane, worker: str) -> None:
        """Use this lane to a worker from now on, until it closes."""
        self._lanes[worker] = lane
        self._only_lane = lane if len(self._lanes) == 1 else None

    @property
    def inline_bytes_max(self) -> int:
        """Messages up to this size fit `infer_bytes`; 0 while there is no worker."""
        if self._only_lane is not None:
            return self._only_lane.inline_bytes_max
        return min((lane.inline_bytes_max for lane in self._lanes.values()), default=0)

    @property
    def calls_in_flight(self) -> int:
        return sum(lane.calls_in_flight for lane in self._lanes.values())

    async def infer(
        self, request: pb.InferRequest, data: Sequence[Piece | None], *, flow: int
    ) -> Result:
        """Send a request; failures are results too.

        data: per input its bytes, or where they are, or None: they are in the request as values.
        """
        try:
            result = await self._lane_for(request).call(request, data, flow=flow)
        except ThirdrailError as error:
            return _logged(self._failed(error, request), request)
        return self._checked(result, request)

    async def infer_on(
        self, worker: str, request: pb.InferRequest, data: Sequence[Piece | None], *, flow: int
    ) -> Result:
        """`infer` for a request that refers to memory which this worker alone has."""
        try:
            model = self._catalog.get(request.model_name)
            workers = () if model is None else model.workers_of(request.model_version)
            if workers and worker not in workers:
                raise InvalidArgument(
                    f"the request's shared memory is with worker '{worker}', the model "
                    f"'{request.model_name}' runs on {', '.join(workers)}"
                )
            lane = self._lanes.get(worker)
            if lane is None:
                raise Unavailable("the worker is starting")
            result = await lane.call(request, data, flow=flow)
        except ThirdrailError as error:
            return _logged(self._failed(error, request), request)
        return self._checked(result, request)

    async def infer_bytes(self, body: bytes, request: pb.InferRequest, *, flow: int) -> Result:
        """The same for a small message that is sent on as it came.

        body: the serialized request; `request` is its parsed form.
        """
        try:
            result = await self._lane_for(request).call_bytes(body, flow=flow)
        except ThirdrailError as error:
            return _logged(self._failed(error, request), request)
        return self._checked(result, request)

    def start(
        self,
        body: bytes,
        request: pb.InferRequest,
        on_result: Callable[[Result], None],
        *,
        flow: int,
    ) -> Cancel:
        """`infer_bytes` for those who need not wait, which spares a task and two turns of the loop.

        `on_result` is called once, maybe before this returns, and must not raise. Returns what
        cancels the request.
        """

        def on_reply(outcome: Reply | ThirdrailError) -> None:
            if isinstance(outcome, ThirdrailError):
                return on_result(_logged(self._failed(outcome, request), request))
            on_result(self._checked(outcome, request))

        try:
            lane = self._lane_for(request)
            call = lane.start(body, on_reply, flow=flow)
        except ThirdrailError as error:
            on_reply(error)
            return lambda: None
        return lambda: lane.cancel(call)

    def _lane_for(self, request: pb.InferRequest) -> AsyncLane:
        """To the worker that has the model; of several, the one with the fewest calls in flight.

        Raises Unavailable; `_exact` knows it better.
        """
        if self._only_lane is not None:
            return self._only_lane
        model = self._catalog.get(request.model_name)
        workers = () if model is None else model.workers_of(request.model_version)
        known = (self._lanes[each] for each in workers if each in self._lanes)
        lanes = [lane for lane in known if not lane.closed.done()]
        if not lanes:
            raise Unavailable("the worker is starting")
        return min(lanes, key=lambda lane: lane.calls_in_flight)

    def _checked(self, result: Result, request: pb.InferRequest) -> Result:
        """The worker knows what is loaded; why something is not, the catalog knows better."""
        status = result.response.status
        if not status.reason:
            return result
        if status.reason == pb.REASON_NOT_FOUND:
            result = self._failed(NotFound(status.message), request)
        return _logged(result, request)

    def _failed(self, error: ThirdrailError, request: pb.InferRequest) -> Result:
        if isinstance(error, NotFound | Unavailable):
            error = self._exact(error, request)
        status = pb.Status(reason=error.reason, message=error.message)
        response = pb.InferResponse(request_id=request.request_id, final=True, status=status)
        return Reply(response, [])

    def _exact(self, error: ThirdrailError, request: pb.InferRequest) -> ThirdrailError:
        try:
            self._catalog.find(request.model_name, request.model_version)
        except ThirdrailError as exact:
            # Without its frames: those of our callers, who have it in a variable, are behind them.
            return exact.with_traceback(None)
        if isinstance(error, NotFound):  # its answer crossed with the news that a load ended
            return Unavailable(
                f"Request for model: '{request.model_name}' came before the model was ready; "
                "it is now"
            )
        return error


def _logged(result: Result, request: pb.InferRequest) -> Result:
    """A failed request leaves a line. At the usual level only those that we are at fault for do:
    callers who err are told, and could otherwise fill the log."""
    status = result.response.status
    fields = {
        "request_id": request.request_id,
        "model": request.model_name,
        "reason": pb.Reason.Name(status.reason).removeprefix("REASON_"),
    }
    level = logging.WARNING if status.reason == pb.REASON_INTERNAL else logging.DEBUG
    log.log(level, "a request failed: %s", status.message, extra=fields)
    return result
