# SPDX-License-Identifier: Apache-2.0
"""BYTES that are too many for the worker's loop: taken apart by the run, as if they were few."""

import threading
from typing import Any

import numpy as np
import pytest

from support.models import identity
from support.runs import OpenSession, Prepare, error_of
from support.served import ON_LOOP, Serving
from support.sessions import Form, Session
from thirdrail import dtypes
from thirdrail.dtypes import object_array
from thirdrail.errors import InvalidArgument
from thirdrail_server.worker.execution import execute
from thirdrail_server.worker.run_place import INLINE_INPUT_BYTES_MAX

TEXTS = object_array([b"x" * (n % 7) for n in range(INLINE_INPUT_BYTES_MAX // 4)], (-1, 4))
BATCHES = "max_batch_size: 100000 dynamic_batching {}"


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that have taken BYTES apart."""
    names: list[str] = []
    decode = dtypes.decode_bytes

    def note(*args: Any) -> list[bytes]:
        names.append(threading.current_thread().name)
        return decode(*args)

    monkeypatch.setattr(dtypes, "decode_bytes", note)
    return names


@pytest.mark.parametrize("form", ["ref", "raw"])
def test_the_elements_are_what_they_are_in_small_requests(
    prepare_model: Prepare, session: Session, form: Form
) -> None:
    prepared = prepare_model(identity("BYTES", ("n", 4)))
    member = session.member(prepared.spec, {"x": TEXTS}, form=form)
    assert member.request.input_bytes > INLINE_INPUT_BYTES_MAX
    (outcome,) = execute(prepared.engine, prepared.spec, [member]).outcomes
    np.testing.assert_array_equal(session.arrays(outcome)["y"], TEXTS)
    assert outcome.copies == 1  # of the results: what is made of texts is not counted
    session.release(outcome)


def test_who_sends_none_hurts_nobody_else(
    prepare_model: Prepare, open_session: OpenSession
) -> None:
    prepared = prepare_model(identity("BYTES", ("n", 4)), BATCHES)
    sessions = [open_session() for _ in range(2)]
    good, bad = (session.message({"x": TEXTS}, form="ref") for session in sessions)
    bad.inputs[0].shape[0] += 1
    members = [
        session.member_of(prepared.spec, message)
        for session, message in zip(sessions, (good, bad), strict=True)
    ]
    first, second = execute(prepared.engine, prepared.spec, members).outcomes
    np.testing.assert_array_equal(sessions[0].arrays(first)["y"], TEXTS)
    assert error_of(second, InvalidArgument) == (
        f"expected {TEXTS.size + 4} string elements for inference input 'x' for model "
        f"'{prepared.spec.model}', got {TEXTS.size}"
    )
    sessions[0].release(first)
    assert [session.output.leased_bytes for session in sessions] == [0, 0]


async def test_they_are_taken_apart_beside_the_loop(serving: Serving, readers: list[str]) -> None:
    async with serving(identity("BYTES", ("n", 4)), place=ON_LOOP) as served:
        here = threading.current_thread().name
        served.release(await served.call({"x": TEXTS[:2]}))
        assert readers == [here]
        served.release(await served.call({"x": TEXTS}))
        assert len(readers) == 2
        assert readers[1] != here
