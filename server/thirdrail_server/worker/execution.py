# SPDX-License-Identifier: Apache-2.0
"""One run of an engine for one batch: gather the inputs, run, scatter the results.

No sockets and no loop: it runs on an instance thread, or on the worker's loop for tiny models.
A run that fails does not say for whose elements, so its members are run again one by one: nobody
answers for his batch-mates. A fault in one member's results is that member's alone.

The copies of tensor bytes, all of them: a batch of several requests is gathered (one copy, also
the snapshot); a single request is bound where it lies, except inputs that must be snapshotted
first; large results whose shape is known beforehand are written by the engine straight into the
caller's slot when the request runs alone; all others are copied out once. What an engine makes of
elements that it cannot take as they are (text, booleans) is a conversion and not counted.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from thirdrail import dtypes, tensors
from thirdrail.dtypes import BYTES
from thirdrail.errors import Internal, InvalidArgument, ThirdrailError
from thirdrail.tensors import Array, TensorSpec
from thirdrail.v1 import inference_pb2, tensor_pb2
from thirdrail_engines.engine import Engine, EngineError, EngineInputError
from thirdrail_server.worker.chunks import Bytes
from thirdrail_server.worker.classification import classify
from thirdrail_server.worker.output_arena import OutputArena
from thirdrail_server.worker.requests import Request, VersionSpec, WantedOutput

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Member:
    """One request of a batch and the output memory of whoever sent it."""

    request: Request
    arena: OutputArena
    inline_bytes_max: int


@dataclass(slots=True)
class Outcome:
    """What one member gets: outputs, or an error. It owns its slots until the outputs are sent.

    The outputs are written into the response at once: as messages of their own they would be
    copied into it.
    """

    arena: OutputArena
    error: ThirdrailError | None = None
    response: inference_pb2.InferResponse = field(default_factory=inference_pb2.InferResponse)
    copies: int = 0
    leases: list[tensor_pb2.ArenaRef] = field(default_factory=list)

    @property
    def outputs(self) -> Sequence[tensor_pb2.Tensor]:
        return self.response.outputs

    def lease(self, size: int) -> tuple[tensor_pb2.ArenaRef, Bytes]:
        """See OutputArena.lease."""
        ref, memory = self.arena.lease(size)
        self.leases.append(ref)
        return ref, memory

    def discard(self) -> None:
        """Nobody will read it: give its slots back."""
        for ref in self.leases:
            self.arena.release(ref.epoch, ref.slot, ref.generation)
        self.leases.clear()

    def fail(self, error: ThirdrailError) -> None:
        """An error in place of everything that was there."""
        self.discard()
        self.response = inference_pb2.InferResponse()
        # Its traceback would keep the run's frames, and in them this outcome: a cycle that holds
        # the session's memory until the garbage collector comes by.
        self.error = error.with_traceback(None)


@dataclass(slots=True)  # not frozen: that makes it three times as long in the making
class Execution:
    outcomes: list[Outcome]
    input_copy_ns: int
    compute_ns: int  # 0: the run failed, or there was none
    output_copy_ns: int
    is_one_run: bool = True  # else the members were run one by one
    has_failed: bool = False  # the run did, whoever's elements were to blame

    @property
    def total_ns(self) -> int:
        """What it took from its thread, failed runs included."""
        return self.input_copy_ns + self.compute_ns + self.output_copy_ns


def execute(engine: Engine, spec: VersionSpec, members: Sequence[Member]) -> Execution:
    """Run one batch. Never raises: every failure is in the outcomes."""
    together = _execute_together(engine, spec, members)
    if len(members) == 1 or not together.has_failed:
        return together
    alone = [_execute_together(engine, spec, [member]) for member in members]
    for execution, outcome in zip(alone, together.outcomes, strict=True):
        execution.outcomes[0].copies += outcome.copies
    return Execution(
        [execution.outcomes[0] for execution in alone],
        together.input_copy_ns + sum(execution.input_copy_ns for execution in alone),
        sum(execution.compute_ns for execution in alone),
        sum(execution.output_copy_ns for execution in alone),
        is_one_run=False,
    )


def _execute_together(engine: Engine, spec: VersionSpec, members: Sequence[Member]) -> Execution:
    outcomes = [Outcome(member.arena) for member in members]
    started = gathered = computed = time.monotonic_ns()
    has_failed = False
    try:
        inputs = _gather(members, outcomes)
        slots = _slots_in_place(members[0], spec, outcomes[0]) if len(members) == 1 else {}
        gathered = computed = time.monotonic_ns()
        wanted = _wanted_names(members, spec)
        results = engine.run(inputs, wanted, {name: slot.array for name, slot in slots.items()})
        computed = time.monotonic_ns()
        _scatter(members, spec, results, slots, outcomes)
    except Exception as error:
        has_failed = not isinstance(error, ThirdrailError)
        answer = _error_for_caller(error, spec)
        for outcome in outcomes:
            outcome.fail(answer)
    return Execution(
        outcomes,
        gathered - started,
        computed - gathered,
        time.monotonic_ns() - computed,
        has_failed=has_failed,
    )


def _error_for_caller(error: Exception, spec: VersionSpec) -> ThirdrailError:
    if isinstance(error, ThirdrailError):
        return error
    if isinstance(error, EngineInputError):
        return InvalidArgument(str(error))
    if isinstance(error, EngineError):
        return Internal(str(error))
    log.error(
        "unexpected failure in a run of %s version %s", spec.model, spec.version, exc_info=error
    )
    return Internal("internal error; the server's log has it")


# Gathering


def _gather(members: Sequence[Member], outcomes: Sequence[Outcome]) -> Mapping[str, Array]:
    first = members[0].request
    if len(members) > 1:
        for outcome in outcomes:
            outcome.copies += 1
        return {
            name: np.concatenate([m.request.inputs[name] for m in members]) for name in first.inputs
        }
    if not first.copy_first:
        return first.inputs
    outcomes[0].copies += 1
    return {
        name: array.copy() if name in first.copy_first else array
        for name, array in first.inputs.items()
    }


def _wanted_names(members: Sequence[Member], spec: VersionSpec) -> list[str]:
    if len(members) == 1:  # in the model's order already
        return [output.name for output in members[0].request.outputs]
    asked = {output.name for member in members for output in member.request.outputs}
    return [name for name in spec.outputs if name in asked]


# Results written in place


@dataclass(slots=True)
class _Slot:
    ref: tensor_pb2.ArenaRef
    array: Array


def _slots_in_place(member: Member, spec: VersionSpec, outcome: Outcome) -> dict[str, _Slot]:
    """Slots for the large results of a single request whose shapes are known before the run."""
    slots: dict[str, _Slot] = {}
    for output in member.request.outputs:
        expected = spec.outputs[output.name]
        shape = _known_shape(expected, spec, member.request.rows)
        if shape is None or output.class_count:
            continue
        size = tensors.element_count(output.name, shape) * expected.dtype.itemsize
        if size > member.inline_bytes_max:
            ref, memory = outcome.lease(size)
            assert expected.dtype.numpy is not None
            slots[output.name] = _Slot(ref, memory.view(expected.dtype.numpy).reshape(shape))
    return slots


def _known_shape(expected: TensorSpec, spec: VersionSpec, rows: int) -> tuple[int, ...] | None:
    shape = expected.shape
    if spec.batch_rows_max and shape:
        shape = (rows, *shape[1:])
    if -1 in shape or expected.dtype is BYTES or expected.dtype.numpy is None:
        return None
    return shape


# Scattering

_ALL_ROWS = slice(None)


def _scatter(
    members: Sequence[Member],
    spec: VersionSpec,
    results: Mapping[str, Array],
    slots: Mapping[str, _Slot],
    outcomes: list[Outcome],
) -> None:
    if not spec.batch_rows_max:  # every request ran alone
        return _collect_or_fail(members[0], spec, results, slots, outcomes[0], _ALL_ROWS)
    rows = sum(member.request.rows for member in members)
    for name, array in results.items():
        if array.ndim == 0 or array.shape[0] != rows:
            raise EngineError(
                f"model '{spec.model}' returned output '{name}' of shape {list(array.shape)} "
                f"for a batch of {rows} rows"
            )
    start = 0
    for member, outcome in zip(members, outcomes, strict=True):
        stop = start + member.request.rows
        _collect_or_fail(member, spec, results, slots, outcome, slice(start, stop))
        start = stop


def _collect_or_fail(
    member: Member,
    spec: VersionSpec,
    results: Mapping[str, Array],
    slots: Mapping[str, _Slot],
    outcome: Outcome,
    rows: slice,
) -> None:
    """A fault in one member's results is that member's alone."""
    try:
        _collect(member, spec, results, slots, outcome, rows)
    except Exception as error:
        outcome.fail(_error_for_caller(error, spec))


def _collect(
    member: Member,
    spec: VersionSpec,
    results: Mapping[str, Array],
    slots: Mapping[str, _Slot],
    outcome: Outcome,
    rows: slice,
) -> None:
    inline_left = member.inline_bytes_max
    is_copied = False
    for output in member.request.outputs:
        array = results[output.name]
        slot = slots.get(output.name)
        if slot is not None:
            if array is not slot.array:
                np.copyto(slot.array, array)
                is_copied = True
            _add_tensor(outcome, output, array).ref.CopyFrom(slot.ref)
            continue
        is_copied = True
        if spec.batch_rows_max:
            array = array[rows]
        if output.class_count:
            labels = spec.labels.get(output.name, ())
            array = classify(array, output.class_count, labels, spec.batch_rows_max)
        tensor = _add_tensor(outcome, output, array)
        inline_left -= _fill(tensor, array, output, outcome, inline_left)
    outcome.copies += is_copied


def _fill(
    tensor: tensor_pb2.Tensor,
    array: Array,
    output: WantedOutput,
    outcome: Outcome,
    room: int,
) -> int:
    """Copy the elements into the message, or into a slot where they take more than `room` bytes.
    Returns how much of the room was used."""
    if array.nbytes <= room and not output.as_values and not array.dtype.hasobject:
        tensor.raw = array.tobytes()  # in wire order: ONNX Runtime's and ours is the host's
        return array.nbytes
    data = memoryview(tensors.bytes_of_array(array))
    if data.nbytes > room:
        ref, memory = outcome.lease(data.nbytes)
        tensor.ref.CopyFrom(ref)
        memory[:] = np.frombuffer(data, np.uint8)
        return 0
    if output.as_values:
        tensor.values.CopyFrom(tensors.values_of_array(array))
    else:
        tensor.raw = bytes(data)
    return data.nbytes


def _add_tensor(outcome: Outcome, output: WantedOutput, array: Array) -> tensor_pb2.Tensor:
    tensor = outcome.response.outputs.add()
    tensor.name = output.name
    tensor.data_type = dtypes.dtype_of_array(array).value
    tensor.shape.extend(array.shape)
    return tensor
