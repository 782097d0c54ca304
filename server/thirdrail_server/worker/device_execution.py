# SPDX-License-Identifier: Apache-2.0
"""The tensors of requests on the device, in runs of engines.

An engine that computes on this device reads and writes them there, of a request alone where they
are, of a batch by copies within the device, and the run is over for its thread when the device has
it. For any other engine, inputs are copied to the host and results back to the device. Each of
these copies counts.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from thirdrail.errors import ThirdrailError
from thirdrail.tensors import Array
from thirdrail_engines.cuda.placed import Placement, Rows
from thirdrail_engines.cuda_engines import is_cuda
from thirdrail_engines.engine import Engine
from thirdrail_engines.plans import Shape
from thirdrail_server.worker.device_regions import RegionPart
from thirdrail_server.worker.device_tensors import DeviceTensor
from thirdrail_server.worker.members import Member, Outcome, PlacedResult
from thirdrail_server.worker.session_device import DeviceCall
from thirdrail_server.worker.version_spec import VersionSpec


def bind_regions(
    engine: Engine, members: Sequence[Member], holding: contextlib.ExitStack
) -> list[dict[str, Any]]:
    """Each member's inputs, of which those in memory of others are DeviceTensors where the engine
    reads them there: held until `holding` ends. The run is over then, for its members have results
    on the host. Not booleans: any other byte than 0 and 1 is undefined to a device.

    Raises InvalidArgument for a region that is closed.
    """
    tensors: list[dict[str, Any]] = [dict(member.request.inputs) for member in members]
    if not is_cuda(engine):
        return tensors
    for member, inputs in zip(members, tensors, strict=True):
        fetches = member.request.fetches
        parts = {id(array): part for part, array in fetches if isinstance(part, RegionPart)}
        for name, array in member.request.inputs.items():
            part = parts.get(id(array))
            if part is None or not part.is_on(engine.device_uuid) or array.dtype == np.bool_:
                continue
            address = holding.enter_context(part.held())
            inputs[name] = DeviceTensor(address, array.dtype, array.shape)
    return tensors


def computes_there(engine: Engine, call: DeviceCall) -> bool:
    """Whether the engine reads and writes the call's tensors where they are."""
    return is_cuda(engine) and engine.device_uuid == call.device.facts.uuid


# For engines that compute there


def placements(
    engine: Engine,
    spec: VersionSpec,
    members: Sequence[Member],
    tensors: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
    holding: contextlib.ExitStack,
) -> dict[int, Placement]:
    """Of those members that have results on the engine's device, or memory of a session there, by
    their number. tensors: the inputs of each. holding: until the run is over."""
    made = {}
    rows_of_all = sum(member.request.rows for member in members)
    is_alone = len(members) == 1
    stop = 0
    for number, (member, inputs, outcome) in enumerate(
        zip(members, tensors, outcomes, strict=True)
    ):
        start, stop = stop, stop + member.request.rows
        rows = Rows(start, stop, rows_of_all) if spec.batch_rows_max else None
        call, parts = member.device, _parts_there(engine, spec, member)
        if call is not None and computes_there(engine, call):
            on_device = [output.name for output in member.request.outputs if output.on_device]
            place = functools.partial(_place, call, member.request.rows, spec, outcome)
            made[number] = Placement(on_device, rows, place, call.record_done, is_in_place=is_alone)
            on_host = any(isinstance(tensor, np.ndarray) for tensor in inputs.values())
            outcome.copies += on_host or not is_alone
            outcome.copies += bool(on_device) and not is_alone
        elif parts:
            place = functools.partial(
                _place_in_parts, parts, member.request.rows, spec, outcome, holding
            )
            made[number] = Placement(list(parts), rows, place, lambda stream: None, is_awaited=True)
            outcome.copies += 1
    return made


def _parts_there(engine: Engine, spec: VersionSpec, member: Member) -> dict[str, RegionPart]:
    """Of memory of others on the engine's device, for results. Such memory need not be aligned as
    an engine wants it: it is copied to."""
    return {
        output.name: output.region
        for output in member.request.outputs
        if output.region is not None
        and not output.class_count
        and spec.outputs[output.name].dtype.numpy is not None
        and is_cuda(engine)
        and output.region.is_on(engine.device_uuid)
    }


def _place(
    call: DeviceCall, rows: int, spec: VersionSpec, outcome: Outcome, shapes: Mapping[str, Shape]
) -> dict[str, int] | None:
    """See Placement.place. Where there is no room, that is this member's fault alone."""
    for name, shape in shapes.items():
        spec.check_rows(name, shape, rows)
    try:
        leased = _leased(call, spec, outcome, shapes)
    except ThirdrailError as error:
        outcome.fail(error)
        return None
    return {name: tensor.address for name, tensor in leased.items()}


def _place_in_parts(
    parts: Mapping[str, RegionPart],
    rows: int,
    spec: VersionSpec,
    outcome: Outcome,
    holding: contextlib.ExitStack,
    shapes: Mapping[str, Shape],
) -> dict[str, int] | None:
    """See Placement.place. A part that is too small or gone is this member's fault alone."""
    places = {}
    try:
        for name, shape in shapes.items():
            spec.check_rows(name, shape, rows)
            size = _tensor(spec, name, shape).nbytes
            parts[name].check_room(name, size)
            places[name] = holding.enter_context(parts[name].held())
    except ThirdrailError as error:
        outcome.fail(error)
        return None
    for name, address in places.items():
        outcome.placed[name] = PlacedResult(None, _tensor(spec, name, shapes[name], address))
    return places


def _tensor(spec: VersionSpec, name: str, shape: Shape, address: int = 0) -> DeviceTensor:
    dtype = spec.outputs[name].dtype.numpy
    assert dtype is not None
    return DeviceTensor(address, dtype, shape)


def _leased(
    call: DeviceCall, spec: VersionSpec, outcome: Outcome, shapes: Mapping[str, Shape]
) -> dict[str, DeviceTensor]:
    """Room for results, which the outcome has then. Raises what `DeviceCall.lease` raises."""
    sizes = {name: _tensor(spec, name, shape).nbytes for name, shape in shapes.items()}
    leased = {}
    for name, (ref, memory) in call.lease(sizes).items():
        leased[name] = _tensor(spec, name, shapes[name], memory.address)
        outcome.placed[name] = PlacedResult(ref, leased[name])
    return leased


# For all others


def read_to_host(call: DeviceCall, inputs: dict[str, Any], outcome: Outcome) -> None:
    """Arrays in place of tensors on the device. Raises EngineError, DeviceLost."""
    is_copied = False
    for name, tensor in inputs.items():
        if not isinstance(tensor, DeviceTensor):
            continue
        array = inputs[name] = np.empty(tensor.shape, tensor.dtype)
        if array.nbytes:
            call.stream.copy_out(array.ctypes.data, tensor.address, array.nbytes)
            is_copied = True
    if is_copied:
        call.stream.synchronize()
        outcome.copies += 1


def write_to_device(
    call: DeviceCall, spec: VersionSpec, arrays: Mapping[str, Array], outcome: Outcome
) -> None:
    """Put results there. Raises what `DeviceCall.lease` raises."""
    kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    leased = _leased(call, spec, outcome, {name: array.shape for name, array in arrays.items()})
    outcome.copies += 1
    try:
        for name, tensor in leased.items():
            if tensor.nbytes:
                call.stream.copy_in(tensor.address, kept[name].ctypes.data, tensor.nbytes)
        call.record_done(call.stream)
    finally:
        call.stream.synchronize()  # before the arrays are gone
