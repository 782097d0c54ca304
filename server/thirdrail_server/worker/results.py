# SPDX-License-Identifier: Apache-2.0
"""From an engine's results to each caller's response: into its slots, or into the message.

A fault in one member's results is that member's alone.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from thirdrail import dtypes, tensors
from thirdrail.dtypes import BYTES
from thirdrail.errors import (
    Internal,
    InvalidArgument,
    ResourceExhausted,
    ThirdrailError,
    Unavailable,
)
from thirdrail.tensors import Array, TensorSpec
from thirdrail.v1 import tensor_pb2
from thirdrail_engines.engine import (
    DeviceLost,
    EngineError,
    EngineInputError,
    EngineMemoryError,
)
from thirdrail_server.worker.classification import classify
from thirdrail_server.worker.device_execution import write_to_device
from thirdrail_server.worker.members import Member, Outcome
from thirdrail_server.worker.version_spec import VersionSpec
from thirdrail_server.worker.wanted_outputs import WantedOutput

log = logging.getLogger(__name__)


def error_for_caller(error: Exception, spec: VersionSpec) -> ThirdrailError:
    """What a caller is told of a failed run."""
    if isinstance(error, ThirdrailError):
        return error
    if isinstance(error, DeviceLost):  # with the process, which the front starts again
        return Unavailable(str(error))
    if isinstance(error, EngineInputError):
        return InvalidArgument(str(error))
    if isinstance(error, EngineMemoryError):
        return ResourceExhausted(str(error))
    if isinstance(error, EngineError):
        return Internal(str(error))
    log.error(
        "unexpected failure in a run of %s version %s", spec.model, spec.version, exc_info=error
    )
    return Internal("internal error; the server's log has it")


# Results written in place


@dataclass(slots=True)
class Slot:
    ref: tensor_pb2.ArenaRef
    array: Array
    is_foretold: bool  # not declared, but seen in an earlier run


def slots_in_place(member: Member, spec: VersionSpec, outcome: Outcome) -> dict[str, Slot]:
    """Slots for the large results of a single request whose shapes are known before the run."""
    slots: dict[str, Slot] = {}
    foretold = spec.output_shapes.foretell(member.request.inputs)
    for output in member.request.outputs:
        expected = spec.outputs[output.name]
        declared = _known_shape(expected, spec, member.request.rows)
        shape = foretold.get(output.name) if declared is None else declared
        if shape is None or output.class_count or output.region is not None or output.on_device:
            continue
        size = tensors.element_count(output.name, shape) * expected.dtype.itemsize
        if size > member.inline_bytes_max:
            ref, memory = outcome.lease(size)
            assert expected.dtype.numpy is not None
            array = memory.view(expected.dtype.numpy).reshape(shape)
            slots[output.name] = Slot(ref, array, is_foretold=declared is None)
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


def scatter(
    members: Sequence[Member],
    spec: VersionSpec,
    results: Mapping[str, Array],
    slots: Mapping[str, Slot],
    outcomes: list[Outcome],
) -> None:
    if not spec.batch_rows_max:  # every request ran alone
        return _collect_or_fail(members[0], spec, results, slots, outcomes[0], _ALL_ROWS)
    rows = sum(member.request.rows for member in members)
    for name, array in results.items():
        spec.check_rows(name, array.shape, rows)
    start = 0
    for member, outcome in zip(members, outcomes, strict=True):
        stop = start + member.request.rows
        _collect_or_fail(member, spec, results, slots, outcome, slice(start, stop))
        start = stop


def _collect_or_fail(
    member: Member,
    spec: VersionSpec,
    results: Mapping[str, Array],
    slots: Mapping[str, Slot],
    outcome: Outcome,
    rows: slice,
) -> None:
    """A fault in one member's results is that member's alone; one that is known, too."""
    if outcome.error is not None:
        return
    try:
        _collect(member, spec, results, slots, outcome, rows)
    except Exception as error:
        outcome.fail(error_for_caller(error, spec))


def _collect(
    member: Member,
    spec: VersionSpec,
    results: Mapping[str, Array],
    slots: Mapping[str, Slot],
    outcome: Outcome,
    rows: slice,
) -> None:
    inline_left = member.inline_bytes_max
    is_copied = False
    if member.device is not None:
        wanted = [output.name for output in member.request.outputs if output.on_device]
        on_host = {
            name: _rows_of(results[name], spec, rows)
            for name in wanted
            if name not in outcome.placed
        }
        if on_host:
            write_to_device(member.device, spec, on_host, outcome)
    for output in member.request.outputs:
        placed = outcome.placed.get(output.name)
        if placed is not None:
            tensor = _add_tensor(outcome, output, cast("Array", placed.tensor))
            if placed.ref is not None:
                tensor.ref.CopyFrom(placed.ref)
            continue
        array = results[output.name]
        slot = slots.get(output.name)
        if slot is not None:
            if array is not slot.array:
                np.copyto(slot.array, array)
                is_copied = True
            _add_tensor(outcome, output, array).ref.CopyFrom(slot.ref)
            continue
        is_copied = True
        array = _rows_of(array, spec, rows)
        if output.region is not None:
            output.region.write(output.name, array)
            _add_tensor(outcome, output, array)
            continue
        if output.class_count:
            labels = spec.labels.get(output.name, ())
            array = classify(array, output.class_count, labels, spec.batch_rows_max)
        tensor = _add_tensor(outcome, output, array)
        inline_left -= _fill(tensor, array, output, outcome, inline_left)
    outcome.copies += is_copied


def _rows_of(array: Array, spec: VersionSpec, rows: slice) -> Array:
    return array[rows] if spec.batch_rows_max else array


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
