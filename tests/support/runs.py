# SPDX-License-Identifier: Apache-2.0
"""One run for one batch, as the tests of runs begin it and look at it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from support.sessions import Session
from thirdrail.errors import ThirdrailError
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.worker.execution import Execution, execute
from thirdrail_server.worker.loading import PreparedVersion
from thirdrail_server.worker.members import Outcome

OpenSession = Callable[..., Session]
Prepare = Callable[..., PreparedVersion]

BATCHES = "max_batch_size: 8 dynamic_batching {}"
WIDE = 1 << 18  # elements; a row of 1 MiB, which never fits a message


def rows_of(*values: float, width: int = 4) -> Array:
    return np.repeat(np.array(values, np.float32), width).reshape(-1, width)


def run(
    prepared: PreparedVersion,
    sessions: Sequence[Session],
    inputs: Sequence[Mapping[str, Array]],
    outputs: Sequence[pb.RequestedOutput] = (),
) -> Execution:
    """A batch of one request of each session."""
    members = [
        session.member(prepared.spec, given, outputs=outputs)
        for session, given in zip(sessions, inputs, strict=True)
    ]
    return execute(prepared.engine, prepared.spec, members)


def run_alone(
    prepared: PreparedVersion,
    session: Session,
    inputs: Mapping[str, Array],
    *outputs: pb.RequestedOutput,
) -> Outcome:
    (outcome,) = run(prepared, [session], [inputs], outputs).outcomes
    return outcome


def error_of(outcome: Outcome, kind: type[ThirdrailError]) -> str:
    assert isinstance(outcome.error, kind)
    assert not outcome.outputs
    return outcome.error.message


def settle(sessions: Sequence[Session], outcomes: Sequence[Outcome]) -> None:
    """Everybody gives back what he got: then nothing may be leased any more."""
    for session, outcome in zip(sessions, outcomes, strict=True):
        session.release(outcome)
    for session in sessions:
        assert session.output.leased_bytes == 0
        assert session.output.stale_releases == 0
