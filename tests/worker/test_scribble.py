# SPDX-License-Identifier: Apache-2.0
"""Inputs that their client writes to during the run, on the worker's own path: message, request,
execution, slot. No foreign byte, no crash.

Float data is made of the bytes 1 to 127 only, whoever wrote it. Around it lies memory filled with
0xEE, and indices and what the heap holds are mostly zero: any other byte in a result came from
where it should not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from support.models import model, tensor
from support.scribbling import Contents, Scribbled, scribbled
from support.sessions import Session
from thirdrail.dtypes import dtype_of_array
from thirdrail.errors import InvalidArgument
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.worker.execution import execute
from thirdrail_server.worker.loading import PreparedVersion
from thirdrail_server.worker.members import Member

Prepare = Callable[..., PreparedVersion]

COUNT = 4096
ROUNDS_MIN = 2000
PATIENCE = 1000  # runs for each run asked for, until the scribbler has done its part
FLOAT_BYTES = (1, 127)


def float_data(seed: int) -> Array:
    low, high = FLOAT_BYTES
    random = np.random.default_rng(seed)
    return random.integers(low, high + 1, 4 * COUNT, dtype=np.uint8).view(np.float32)


# Two contents for each input: what is there, and what is written over it.
X = (float_data(0), float_data(1))
INDICES = np.arange(COUNT)
STEERED: dict[str, Contents] = {
    "Gather": {"x": X, "steer": (INDICES, INDICES + COUNT)},  # into the memory behind x
    "Compress": {"x": X, "steer": (INDICES % 3 == 0, INDICES >= 0)},
    "Reshape": {"x": X, "steer": (np.array([2, COUNT // 2]), np.array([COUNT, COUNT]))},
}


def steered(operator: str) -> onnx.ModelProto:
    """y = operator(x, steer)."""
    steer = STEERED[operator]["steer"][0]
    attributes: dict[str, Any] = {"axis": 0} if operator == "Compress" else {}
    node = helper.make_node(operator, ["x", "steer"], ["y"], **attributes)
    inputs = [tensor("x", "FP32", ("n",)), tensor("steer", dtype_of_array(steer).name, ("k",))]
    return model([node], inputs, [tensor("y", "FP32", ("a", "b")[: 1 + (operator == "Reshape")])])


class Runs:
    """Runs of one request whose inputs lie where the scribbler writes."""

    def __init__(
        self, prepared: PreparedVersion, session: Session, places: Scribbled, contents: Contents
    ) -> None:
        self._prepared = prepared
        self._session = session
        self._message = pb.InferRequest()
        for name, (whole, _) in contents.items():
            asked = self._message.inputs.add(
                name=name, data_type=dtype_of_array(whole).value, shape=whole.shape
            )
            asked.ref.epoch = session.input.epoch
            asked.ref.offset, asked.ref.size = places.places[name], whole.nbytes

    def run(self, *, with_snapshot: bool = True) -> Array | None:
        """The result's bytes; None where the engine refused what it was given."""
        member = self._session.member_of(self._prepared.spec, self._message)
        if not with_snapshot:
            bare = dataclasses.replace(member.request, copy_first=())
            member = Member(bare, member.arena, member.inline_bytes_max)
        (outcome,) = execute(self._prepared.engine, self._prepared.spec, [member]).outcomes
        if outcome.error is not None:
            assert isinstance(outcome.error, InvalidArgument)
            return None
        found = self._session.arrays(outcome)["y"].view(np.uint8)
        self._session.release(outcome)
        return found


def is_foreign(found: Array) -> bool:
    return bool(found.min() < FLOAT_BYTES[0] or found.max() > FLOAT_BYTES[1])


@pytest.mark.parametrize("runs_min", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("operator", sorted(STEERED))
def test_a_scribbling_client_learns_nothing_and_breaks_nothing(
    prepare_model: Prepare, session: Session, operator: str, runs_min: int
) -> None:
    prepared = prepare_model(steered(operator))
    contents = STEERED[operator]
    runs = answered = 0
    fd = session.input_fd
    with scribbled(fd, session.input.total_bytes, contents) as scribbling:
        asked = Runs(prepared, session, scribbling, contents)
        while runs < runs_min or scribbling.rounds() < ROUNDS_MIN or not answered:
            runs += 1
            assert runs < runs_min * PATIENCE, "the scribbler hardly ran"
            found = asked.run()
            if found is None:
                continue
            answered += 1
            assert found.size <= 4 * COUNT
            assert not is_foreign(found)
    assert session.output.leased_bytes == 0


def test_without_the_snapshot_a_scribbling_client_reads_what_is_not_his(
    prepare_model: Prepare, session: Session
) -> None:
    """So the test above can fail. What is behind x is the client's own here: nothing crashes."""
    prepared = prepare_model(steered("Gather"))
    contents = STEERED["Gather"]
    fd = session.input_fd
    with scribbled(fd, session.input.total_bytes, contents) as scribbling:
        asked = Runs(prepared, session, scribbling, contents)
        for _ in range(PATIENCE * 1000):
            found = asked.run(with_snapshot=False)
            if found is not None and is_foreign(found):
                return
    pytest.fail("no foreign byte was seen")
