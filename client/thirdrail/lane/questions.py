# SPDX-License-Identifier: Apache-2.0
"""What is asked of a worker beside calls, and answered by number: pings, exports, imports."""

import itertools
import threading
import time
from collections.abc import Callable

from thirdrail.errors import ThirdrailError, error_of_reason
from thirdrail.failures import anew, with_note
from thirdrail.lane.calls import NotSent, timed_out
from thirdrail.lane.packets import close_all
from thirdrail.lane.turns import Ticket, Turns
from thirdrail.v1 import lane_pb2

# LaneResponse's field -> the one of LaneRequest that it answers.
_ASKED_BY = {
    "pong": "ping",
    "exported": "export_tensor",
    "imported": "import_tensor",
    "revoked": "revoke",
    "device_attached": "device",
}

Send = Callable[[lane_pb2.LaneRequest, float | None], None]
OnAnswer = Callable[[lane_pb2.LaneResponse, list[int]], None]


class _Question(Ticket):
    __slots__ = ("answer", "on_answer")

    def __init__(self, on_answer: OnAnswer | None) -> None:
        super().__init__()
        self.answer: lane_pb2.LaneResponse | None = None
        self.on_answer = on_answer


class Questions:
    """Those of one session that are open."""

    def __init__(self, lock: threading.Lock, turns: Turns, send: Send) -> None:
        self._lock = lock
        self._turns = turns
        self._send = send
        self._numbers = itertools.count(1)
        self._open: dict[tuple[str, int], _Question] = {}
        self._ended: ThirdrailError | None = None

    def ask(
        self, message: lane_pb2.LaneRequest, timeout: float, on_answer: OnAnswer | None = None
    ) -> lane_pb2.LaneResponse:
        """Sends a message, whose `request` number is filled in, and waits for the answer.

        timeout: seconds.
        on_answer: called by the thread that reads, before it reads on; takes over the descriptors.
        Raises the answer's status as an error, TimedOut, the lane's error when it ends, NotSent
        when it had ended before.
        """
        kind = message.WhichOneof("message") or ""
        number = getattr(message, kind).request = next(self._numbers)
        question = _Question(on_answer)
        with self._lock:
            if self._ended is not None:
                raise NotSent(str(self._ended))
            self._open[kind, number] = question
        deadline_s = time.monotonic() + timeout
        try:
            self._send(message, deadline_s)
            if not self._turns.wait(question, deadline_s):
                raise timed_out(timeout)
        finally:
            with self._lock:
                self._open.pop((kind, number), None)
        if question.answer is None:
            assert self._ended is not None
            raise anew(self._ended)
        return _checked(question.answer)

    def answered(self, kind: str, message: lane_pb2.LaneResponse, fds: list[int]) -> bool:
        """A message came, to be called by whoever reads. False: nobody waits for it.

        Takes over the descriptors of an answer.
        """
        asked = _ASKED_BY.get(kind)
        if asked is None:
            return False
        with self._lock:
            question = self._open.pop((asked, getattr(message, kind).request), None)
        if question is None:
            return False
        if question.on_answer is None:
            close_all(fds)
        else:
            question.on_answer(message, fds)
        with self._lock:
            question.answer = message
            self._turns.complete(question)
        return True

    def end(self, error: ThirdrailError) -> None:
        """The lane has ended. To be called with the lock held."""
        self._ended = error
        for question in self._open.values():
            self._turns.complete(question)


def _checked(answer: lane_pb2.LaneResponse) -> lane_pb2.LaneResponse:
    body = getattr(answer, answer.WhichOneof("message") or "")
    status = getattr(body, "status", None)
    if status is not None and status.reason:
        raise with_note(error_of_reason(status.reason, status.message))
    return answer
