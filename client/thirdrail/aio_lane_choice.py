# SPDX-License-Identifier: Apache-2.0
"""Which lane a call takes, and what is known of its model; a part of `aio.AsyncClient`."""

import contextlib
import time
from typing import TYPE_CHECKING

from thirdrail import models
from thirdrail.aio_server_calls import AsyncServerCalls
from thirdrail.errors import FailedPrecondition, NotFound, ThirdrailError, Unavailable
from thirdrail.failures import with_note
from thirdrail.lane.attach import ASK_TIMEOUT_S
from thirdrail.models import DescriptionCache, ModelDescription
from thirdrail.option_values import require_timeout
from thirdrail.requests import InferOptions, Inputs, needs_description

if TYPE_CHECKING:  # needs Linux
    from thirdrail.lane.aio_session import AsyncSession


class AsyncLaneChoice(AsyncServerCalls):
    """The twin of `lane_choice.LaneChoice`."""

    def __init__(self) -> None:
        self._descriptions = DescriptionCache()

    async def _session_for(self, model: str) -> "AsyncSession | None":
        """With a worker that serves the model; None: there is no lane."""
        lanes = self._connected().lanes
        if not lanes.are_several:
            session = await lanes.home.session()
            if not lanes.are_several:  # which attaching has told
                return session
        workers = lanes.place(model, time.monotonic_ns())
        if workers is None:
            workers = lanes.found(model, await self._workers_of(model), time.monotonic_ns())
        *others, last = lanes.to(workers)
        for access in others:
            with contextlib.suppress(FailedPrecondition, Unavailable):
                session = await access.session()
                if session is not None:
                    return session
        return await last.session()

    async def _workers_of(self, model: str) -> tuple[str, ...]:
        try:
            return (await self._describe(model, 0, ASK_TIMEOUT_S)).status.workers
        except NotFound:
            return ()  # the first worker is asked, and knows it no more
        except ThirdrailError:  # a busy server is no reason why the lane should not be used
            return self._connected().lanes.known(model)

    async def _why_missing(
        self, model: str, options: InferOptions, error: NotFound
    ) -> ThirdrailError:
        """What the server says of a model that its worker does not know. It may be on its way."""
        self._connected().lanes.forget(model)
        try:
            version = options.get("version", 0)
            status = (await self._describe(model, version, ASK_TIMEOUT_S)).status
        except NotFound:
            return error
        except ThirdrailError as reason:
            return reason
        return with_note(models.error_of_missing(status, version))

    async def _needed_description(
        self, model: str, inputs: Inputs, options: InferOptions
    ) -> ModelDescription | None:
        if not needs_description(inputs, options):
            return None
        return await self._description(model, options.get("version", 0), options.get("timeout"))

    async def _description(
        self, model: str, version: int, timeout: float | None
    ) -> ModelDescription:
        now_ns = time.monotonic_ns()
        description = self._descriptions.get(model, version, now_ns)
        if description is None:
            require_timeout(timeout)
            description = await self._describe(model, version, timeout)
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
