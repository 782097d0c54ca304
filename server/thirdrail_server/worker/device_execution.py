# SPDX-License-Identifier: Apache-2.0
"""One run of an engine with tensors on the device.

An engine that computes on this device reads and writes them where they are, and the run is over
for its thread when the device has it. For any other, inputs are copied to the host and results back
to the device; each way counts as a copy.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from thirdrail.tensors import Array
from thirdrail_engines.cuda.placed import Placement
from thirdrail_engines.cuda_engines import is_cuda
from thirdrail_engines.engine import Engine
from thirdrail_server.worker.device_regions import RegionPart
from thirdrail_server.worker.device_tensors import DeviceTensor
from thirdrail_server.worker.members import Member, Outcome
from thirdrail_server.worker.results import Slot
from thirdrail_server.worker.session_device import DeviceCall, Refs

if TYPE_CHECKING:
    from thirdrail_engines.cuda.engine import CudaEngine


def bind_regions(
    engine: Engine, members: Sequence[Member], holding: contextlib.ExitStack
) -> list[dict[str, Any]]:
    """Each member's inputs, of which those in memory of others are DeviceTensors where the engine
    reads them there: held until `holding` ends. Not booleans: any other byte than 0 and 1 is
    undefined to a device.

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


def run_with_device(
    engine: Engine,
    member: Member,
    call: DeviceCall,
    inputs: Mapping[str, Any],
    slots: dict[str, Slot],
    outcome: Outcome,
) -> Mapping[str, Any]:
    """The results, arrays or tensors on the device; of these the slots are filled in.

    Raises what `Engine.run` and `DeviceCall.lease` raise.
    """
    wanted = [output.name for output in member.request.outputs]
    on_device = [output.name for output in member.request.outputs if output.on_device]
    if is_cuda(engine) and engine.device_uuid == call.device.facts.uuid:
        return _run_placed(engine, inputs, wanted, on_device, call, slots, outcome)
    results: dict[str, Any] = dict(engine.run(_on_host(inputs, call, outcome), wanted, {}))
    if on_device:
        outcome.copies += 1
        _put(call, {name: results[name] for name in on_device}, results, slots)
    return results


def _run_placed(
    engine: "CudaEngine",
    inputs: Mapping[str, Any],
    wanted: list[str],
    on_device: list[str],
    call: DeviceCall,
    slots: dict[str, Slot],
    outcome: Outcome,
) -> Mapping[str, Any]:
    places: Refs = {}

    def place(sizes: Mapping[str, int]) -> dict[str, int]:
        places.update(call.lease(sizes))
        return {name: memory.address for name, (_, memory) in places.items()}

    placement = Placement(on_device, place, call.record_done)
    results: dict[str, Any] = dict(engine.run_placed(inputs, wanted, placement))
    outcome.copies += any(isinstance(tensor, np.ndarray) for tensor in inputs.values())
    dtypes = {spec.name: spec.dtype.numpy for spec in engine.spec.outputs}
    for name, (ref, memory) in places.items():
        dtype = dtypes[name]
        assert dtype is not None
        results[name] = tensor = DeviceTensor(memory.address, dtype, results[name])
        slots[name] = Slot(ref, tensor, is_foretold=False)  # type: ignore[arg-type]
    return results


def _on_host(inputs: Mapping[str, Any], call: DeviceCall, outcome: Outcome) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    is_copied = False
    for name, tensor in inputs.items():
        if not isinstance(tensor, DeviceTensor):
            arrays[name] = tensor
            continue
        array = arrays[name] = np.empty(tensor.shape, tensor.dtype)
        if array.nbytes:
            call.stream.copy_out(array.ctypes.data, tensor.address, array.nbytes)
            is_copied = True
    if is_copied:
        call.stream.synchronize()
        outcome.copies += 1
    return arrays


def _put(
    call: DeviceCall, arrays: Mapping[str, Array], results: dict[str, Any], slots: dict[str, Slot]
) -> None:
    places = call.lease({name: array.nbytes for name, array in arrays.items()})
    kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for name, (ref, memory) in places.items():
        array = kept[name]
        if array.nbytes:
            call.stream.copy_in(memory.address, array.ctypes.data, array.nbytes)
        tensor = DeviceTensor(memory.address, array.dtype, arrays[name].shape)
        results[name] = tensor
        slots[name] = Slot(ref, tensor, is_foretold=False)  # type: ignore[arg-type]
    call.record_done(call.stream)
    call.stream.synchronize()  # before the arrays are gone
