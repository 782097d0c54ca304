# SPDX-License-Identifier: Apache-2.0
"""One run of an engine for one batch: gather the inputs, run, scatter the results.

No sockets and no loop: it runs on an instance thread, or on the worker's loop for tiny models.
A run that fails does not say for whose elements, so its members are run again one by one: nobody
answers for his batch-mates. A fault in one member's results is that member's alone.

The copies of tensor bytes, all of them: a batch of several requests is gathered (one copy, also
the snapshot); a single request is bound where it lies, except inputs that must be snapshotted
first; large results whose shape is known beforehand are written by the engine straight into the
caller's slot when the request runs alone; all others are copied out once. What an engine makes of
elements that it cannot take as they are (text, booleans) is a conversion and not counted. The
engine for devices gathers and scatters by itself, on the host in copies that a single request takes
as well; what members of a batch have on the device is copied there.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thirdrail.errors import ThirdrailError
from thirdrail.tensors import Array
from thirdrail_engines.cuda.placed import Placement
from thirdrail_engines.cuda_engines import is_cuda
from thirdrail_engines.engine import DeviceLost, Engine, EngineError
from thirdrail_server.worker.device_execution import (
    bind_regions,
    computes_there,
    placements,
    read_to_host,
)
from thirdrail_server.worker.device_regions import RegionPart
from thirdrail_server.worker.large_texts import LargeText
from thirdrail_server.worker.members import Member, Outcome
from thirdrail_server.worker.results import Slot, error_for_caller, scatter, slots_in_place
from thirdrail_server.worker.version_spec import VersionSpec


@dataclass(slots=True)  # not frozen: that makes it three times as long in the making
class Execution:
    outcomes: list[Outcome]
    input_copy_ns: int
    compute_ns: int  # 0: the run failed, or there was none
    output_copy_ns: int
    is_one_run: bool = True  # else the members were run one by one
    has_failed: bool = False  # the run did, whoever's elements were to blame
    is_answered: bool = False  # its one member, by the thread that ran it
    device_lost: DeviceLost | None = None

    @property
    def total_ns(self) -> int:
        """What it took from its thread, failed runs included."""
        return self.input_copy_ns + self.compute_ns + self.output_copy_ns


def execute(engine: Engine, spec: VersionSpec, members: Sequence[Member]) -> Execution:
    """Run one batch. Never raises: every failure is in the outcomes."""
    together = _execute_together(engine, spec, members)
    if len(members) == 1 or not together.has_failed or together.device_lost:
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
        device_lost=next(filter(None, (execution.device_lost for execution in alone)), None),
    )


def _execute_together(engine: Engine, spec: VersionSpec, members: Sequence[Member]) -> Execution:
    if not is_cuda(engine) and not any(
        member.request.fetches or member.device is not None for member in members
    ):
        return _run_together(engine, spec, members, None)
    with contextlib.ExitStack() as holding:  # until the run is over
        return _run_together(engine, spec, members, holding)


def _run_together(
    engine: Engine,
    spec: VersionSpec,
    members: Sequence[Member],
    holding: contextlib.ExitStack | None,
) -> Execution:
    """holding: for what is not in memory of ours on the host; None: there is nothing."""
    outcomes = [Outcome(member.arena) for member in members]
    started = gathered = computed = time.monotonic_ns()
    has_failed = is_fetched = False
    device_lost = None
    slots: dict[str, Slot] = {}
    placed: Mapping[int, Placement] = {}

    def receive(results: Mapping[str, Any]) -> None:
        nonlocal computed
        computed = time.monotonic_ns()
        scatter(members, spec, results, slots, outcomes)

    try:
        tensors: Sequence[Mapping[str, Any]] = [member.request.inputs for member in members]
        if holding is not None:
            tensors = bound = bind_regions(engine, members, holding)
            _fetch(engine, members, bound, outcomes)
            placed = placements(engine, spec, members, tensors, outcomes, holding)
        is_fetched = True
        if is_cuda(engine) and (len(members) > 1 or placed):
            parts = {name: [each[name] for each in tensors] for name in tensors[0]}
            wanted = _wanted_names(members, spec, placed)
            gathered = computed = time.monotonic_ns()
            engine.run_batch(parts, wanted, receive, list(placed.values()))
        else:
            inputs = _gather(members, tensors, outcomes)
            if len(members) == 1:
                slots.update(slots_in_place(members[0], spec, outcomes[0]))
            gathered = computed = time.monotonic_ns()
            if len(members) == 1:
                receive(_run_alone(engine, spec, members[0], inputs, slots, outcomes[0]))
            else:
                receive(engine.run(inputs, _wanted_names(members, spec, placed), {}))
    except Exception as error:
        has_failed = not isinstance(error, ThirdrailError) or not is_fetched
        device_lost = error if isinstance(error, DeviceLost) else None
        answer = error_for_caller(error, spec)
        for member, outcome in zip(members, outcomes, strict=True):
            outcome.fail(answer)
            if member.device is not None:
                member.device.give_back()
    return Execution(
        outcomes,
        gathered - started,
        computed - gathered,
        time.monotonic_ns() - computed,
        has_failed=has_failed,
        device_lost=device_lost,
    )


def _run_alone(
    engine: Engine,
    spec: VersionSpec,
    member: Member,
    inputs: Mapping[str, Array],
    slots: dict[str, Slot],
    outcome: Outcome,
) -> Mapping[str, Array]:
    """Run the engine, a second time where slots of foretold shapes could be to blame."""
    wanted = [output.name for output in member.request.outputs]  # in the model's order already
    into = {name: slot.array for name, slot in slots.items()}
    foretold = [name for name, slot in slots.items() if slot.is_foretold]
    try:
        results = engine.run(inputs, wanted, into)
    except EngineError:
        if not foretold:
            raise
        declared = {name: array for name, array in into.items() if name not in foretold}
        results = engine.run(inputs, wanted, declared)
        wrong = [name for name in foretold if results[name].shape != into[name].shape]
        for name in wrong:
            outcome.give_back(slots.pop(name).ref)
        spec.output_shapes.was_wrong(wrong)
    for name in wanted:
        array = results[name]
        is_large = array.nbytes > member.inline_bytes_max and not array.dtype.hasobject
        if is_large and name not in slots:
            spec.output_shapes.note(member.request.inputs, name, array.shape)
    return results


# Gathering


def _fetch(
    engine: Engine,
    members: Sequence[Member],
    tensors: Sequence[dict[str, Any]],
    outcomes: Sequence[Outcome],
) -> None:
    """From the device, where the engine is elsewhere; from memory of others there, which may be
    gone; and texts, which may be none. Their owners alone answer for that.

    tensors: of each member. What is not the array of the request any more is read where it is.
    """
    for member, inputs, outcome in zip(members, tensors, outcomes, strict=True):
        if member.device is not None and not computes_there(engine, member.device):
            read_to_host(member.device, inputs, outcome)
        names = {id(tensor): name for name, tensor in inputs.items()}
        is_copied = False
        for part, array in member.request.fetches:
            name = names.get(id(array))
            if isinstance(part, LargeText) and name is not None:
                inputs[name] = part.elements(array.shape)
            elif isinstance(part, RegionPart) and name is not None:
                part.read_into(array)
                is_copied = True
        outcome.copies += is_copied


def _gather(
    members: Sequence[Member], tensors: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome]
) -> Mapping[str, Any]:
    first = tensors[0]
    if len(members) > 1:
        for outcome in outcomes:
            outcome.copies += 1
        return {name: np.concatenate([each[name] for each in tensors]) for name in first}
    copy_first = members[0].request.copy_first
    if not copy_first:
        return first
    outcomes[0].copies += 1
    return {name: array.copy() if name in copy_first else array for name, array in first.items()}


def _wanted_names(
    members: Sequence[Member], spec: VersionSpec, placed: Mapping[int, Placement]
) -> list[str]:
    """What somebody wants on the host, in the model's order."""
    asked = {
        output.name
        for number, member in enumerate(members)
        for output in member.request.outputs
        if number not in placed or output.name not in placed[number].on_device
    }
    return [name for name in spec.outputs if name in asked]
