# SPDX-License-Identifier: Apache-2.0
"""One call in flight on an event loop's session: what it holds, and what becomes of it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from thirdrail.errors import ThirdrailError
from thirdrail.lane.calls import Checksum
from thirdrail.lane.places import Place
from thirdrail.v1 import inference_pb2

# Told once when nobody takes a call's answer, with it; None: the request was not sent.
Unclaimed = Callable[[inference_pb2.InferResponse | None], None]
# With the input memory of its call, to be left by whoever takes it.
Answer = tuple[inference_pb2.InferResponse, list[Place]]


@dataclass(slots=True)
class AsyncCall:
    """places: the input memory that it reads. checksums: debug mode's."""

    future: asyncio.Future[inference_pb2.InferResponse]
    unclaimed: Unclaimed
    places: list[Place] = field(default_factory=list)
    checksums: list[Checksum] = field(default_factory=list)

    def answer(self, response: inference_pb2.InferResponse) -> bool:
        """The final response came. False: nobody takes it, and nobody its places.

        To be asked while the places are still taken.
        """
        fault = self._first_fault()
        if not self.future.done() and fault is None:
            self.future.set_result(response)
            return True
        self.unclaimed(response)
        if not self.future.done() and fault is not None:
            self.future.set_exception(fault)
        return False

    def _first_fault(self) -> ThirdrailError | None:
        return next(filter(None, (each.fault() for each in self.checksums)), None)
