# SPDX-License-Identifier: Apache-2.0
"""Which lane a call takes, and what is known of its model; a part of `client.Client`."""

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from thirdrail import models
from thirdrail.errors import FailedPrecondition, NotFound, ThirdrailError, Unavailable
from thirdrail.failures import with_note
from thirdrail.lane.attach import ASK_TIMEOUT_S
from thirdrail.lane.calls import NotSent
from thirdrail.models import DescriptionCache, ModelDescription
from thirdrail.option_values import require_timeout
from thirdrail.requests import InferOptions, Inputs, needs_description
from thirdrail.server_calls import ServerCalls
from thirdrail.transport import needs_lane

if TYPE_CHECKING:  # needs Linux
    from thirdrail.lane.blocking import BlockingLane

T = TypeVar("T")


class LaneChoice(ServerCalls):
    """See `lanes`."""

    def __init__(self) -> None:
        self._descriptions = DescriptionCache()

    def _over_lane(self, call: "Callable[[BlockingLane], T]", model: str = "") -> T | None:
        """What `call` makes of the lane; None: there is no lane.

        model: whose worker it is to be; the server's first by default.
        """
        lane = self._lane_for(model)
        if lane is None:
            return None
        try:
            return call(lane)
        except NotSent:  # the session ended, and the worker has not heard of the call
            lane = self._lane_for(model)
            return None if lane is None else call(lane)

    def _lane_for(self, model: str) -> "BlockingLane | None":
        lanes = self._connected().lanes
        if not lanes.are_several:
            lane = lanes.home.lane()
            if not model or not lanes.are_several:  # which attaching has told
                return lane
        workers = lanes.place(model, time.monotonic_ns()) if model else ()
        if workers is None:
            workers = lanes.found(model, self._workers_of(model), time.monotonic_ns())
        *others, last = lanes.to(workers)
        for access in others:
            with contextlib.suppress(FailedPrecondition, Unavailable):
                lane = access.lane()
                if lane is not None:
                    return lane
        return last.lane()

    def _workers_of(self, model: str) -> tuple[str, ...]:
        try:
            return self._describe(model, 0, ASK_TIMEOUT_S).status.workers
        except NotFound:
            return ()  # the first worker is asked, and knows it no more
        except ThirdrailError:  # a busy server is no reason why the lane should not be used
            return self._connected().lanes.known(model)

    def _why_missing(self, model: str, options: InferOptions, error: NotFound) -> ThirdrailError:
        """What the server says of a model that its worker does not know. It may be on its way."""
        self._connected().lanes.forget(model)
        try:
            version = options.get("version", 0)
            status = self._describe(model, version, ASK_TIMEOUT_S).status
        except NotFound:
            return error
        except ThirdrailError as reason:
            return reason
        return with_note(models.error_of_missing(status, version))

    def _on_lane(self, call: "Callable[[BlockingLane], T]") -> T:
        """Raises FailedPrecondition where there is no lane."""
        made = self._over_lane(call)
        if made is None:
            raise FailedPrecondition(needs_lane(self._connected().lanes.transport))
        return made

    def _needed_description(
        self, model: str, inputs: Inputs, options: InferOptions
    ) -> ModelDescription | None:
        if not needs_description(inputs, options):
            return None
        return self._description(model, options.get("version", 0), options.get("timeout"))

    def _description(self, model: str, version: int, timeout: float | None) -> ModelDescription:
        now_ns = time.monotonic_ns()
        description = self._descriptions.get(model, version, now_ns)
        if description is None:
            require_timeout(timeout)
            description = self._describe(model, version, timeout)
            models.require_declaration(description, version)
            self._descriptions.put(model, version, description, now_ns)
        return description

    def _was_outdated(
        self, model: str, inputs: Inputs, options: InferOptions, began_ns: int
    ) -> bool:
        """Whether a request that began then, and was refused, may have been built by a declaration
        of before a reload. The next one asks for it."""
        version = options.get("version", 0)
        return needs_description(inputs, options) and self._descriptions.forget_older(
            model, version, began_ns
        )
