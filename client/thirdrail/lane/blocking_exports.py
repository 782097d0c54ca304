# SPDX-License-Identifier: Apache-2.0
"""Exporting and importing tensors over a lane, for threads."""

import time
from typing import TYPE_CHECKING, Any

from thirdrail.errors import FailedPrecondition, ThirdrailError
from thirdrail.lane.exports import (
    ANSWER_S_MAX,
    SharedTensor,
    array_to_export,
    copy_into,
    export_request,
    forbid_writing,
    place_to_export,
    session_has_ended,
    show_imported,
    text_of_token,
    token_of_text,
)
from thirdrail.lane.places import Place
from thirdrail.tensors import Array
from thirdrail.v1 import lane_pb2

if TYPE_CHECKING:
    from thirdrail.lane.blocking import BlockingLane


class Export:
    """A tensor that another process may have.

    token: its text, for one `receive`; whoever has it can take the tensor. The other process must
        run as the user that it is for.
    copies: of the tensor's bytes that the export took.
    """

    def __init__(self, lane: "BlockingLane", token: str, number: int, copies: int) -> None:
        self.token = token
        self.copies = copies
        self._lane = lane
        self._number = number

    def revoke(self) -> None:
        """Take it back, and from whomever it was handed on to: their requests that refer to it are
        refused from now on. May be called twice.

        Raises FailedPrecondition when the session that exported it has ended.
        """
        revoke = lane_pb2.RevokeRequest(export_id=self._number)
        try:
            self._lane.talk.questions.ask(lane_pb2.LaneRequest(revoke=revoke), ANSWER_S_MAX)
        except ThirdrailError:
            if not self._lane.has_ended:
                raise
            raise FailedPrecondition(session_has_ended(self._lane.end_reason)) from None

    def __repr__(self) -> str:
        return f"<Export {self._number}, copies {self.copies}>"  # the token is a secret


def export(lane: "BlockingLane", value: Any, uid: int | None, lifetime: float) -> Export:
    """See `Client.export`."""
    array, talk = array_to_export(value), lane.talk
    talk.give_back_unused()
    with talk.lock:
        found = place_to_export(talk.memory, array)
        if found is not None:
            found[0].users += 1  # until the answer comes
    place, offset = found or (_copied(lane, array), 0)
    try:
        question = export_request(place, offset, array, uid, lifetime)
        answer = talk.questions.ask(question, ANSWER_S_MAX).exported
    finally:
        with talk.lock:
            talk.memory.leave(place)
        talk.send_drops()
    if found is not None:
        forbid_writing(value, place)
    copies = answer.copies + (found is None)
    return Export(lane, text_of_token(answer.token), answer.export_id, copies)


def _copied(lane: "BlockingLane", array: Array) -> Place:
    """The array in a chunk of its own."""
    placer, deadline_s = lane.talk.placer, time.monotonic() + ANSWER_S_MAX
    place = placer.reserve_alone(max(1, array.nbytes), deadline_s, ANSWER_S_MAX)
    copy_into(place, array)
    return place


def receive(lane: "BlockingLane", token: str) -> SharedTensor:
    """See `Client.receive`."""
    talk = lane.talk
    arrived: list[SharedTensor | Exception] = []

    def on_answer(message: lane_pb2.LaneResponse, fds: list[int]) -> None:
        if message.imported.status.reason:
            return
        try:
            with talk.lock:
                shared = show_imported(talk.memory, message.imported, fds, _Importer(lane))
        except Exception as error:  # raised by who asked, not by who happens to read
            arrived.append(error)
        else:
            arrived.append(shared)

    request = lane_pb2.ImportRequest(token=token_of_text(token))
    talk.give_back_unused()
    talk.questions.ask(lane_pb2.LaneRequest(import_tensor=request), ANSWER_S_MAX, on_answer)
    (outcome,) = arrived
    if isinstance(outcome, Exception):
        talk.send_drops()
        raise outcome
    return outcome


class _Importer:
    """The session of a tensor that was received: see `exports.Session`."""

    def __init__(self, lane: "BlockingLane") -> None:
        self._lane = lane

    def is_revoked(self, epoch: int) -> bool:
        if not self._lane.has_ended:
            self._lane.poll()  # nobody may be reading
        return epoch in self._lane.talk.memory.revoked

    def give_back(self, place: Place) -> None:
        talk = self._lane.talk
        talk.memory.shown.let_go(place)
        talk.give_back_unused()
