# SPDX-License-Identifier: Apache-2.0
"""The engine that runs a program on a device.

Per instance one context and three streams: inputs go in on one, the program computes on the second,
results come out on the third, and events join them. So the copies of one run overlap the computing
of another. A run takes one of the instance's slots, which holds its memory on the device, and
waits on its own thread until the last copy is done; other threads run meanwhile. A run without
anything on the host is over for its thread when the device has it.

Copies of a tensor's bytes: caller -> pinned memory -> device -> pinned memory -> result. The first
is the snapshot: nobody can change what is computed with. A batch is gathered by it, and scattered
from the second pinned memory, so it takes no copy more than a request alone. Where pinned memory is
short, the driver copies from and to the caller's memory itself.

All device memory but that of open outputs is taken when the engine is made, for the largest shapes
of the profiles: a request does not fail for lack of it. What is computed in between lies in
memory that all engines on the device share (activations.py).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from thirdrail.tensors import Array
from thirdrail_engines.cuda.activations import Share
from thirdrail_engines.cuda.device import Device
from thirdrail_engines.cuda.errors import OutOfDeviceMemory
from thirdrail_engines.cuda.graph_cache import GraphFigures
from thirdrail_engines.cuda.instance import Instance
from thirdrail_engines.cuda.layout import lay_out
from thirdrail_engines.cuda.options import CudaOptions
from thirdrail_engines.cuda.parts import joined
from thirdrail_engines.cuda.placed import Placement
from thirdrail_engines.cuda.program import Program, choose_profile, largest_shapes, refusal
from thirdrail_engines.cuda.request import Request, check_request
from thirdrail_engines.cuda.slots import SlotTable
from thirdrail_engines.cuda.staging import PinnedPool, StagingFigures
from thirdrail_engines.engine import (
    DeviceLost,
    EngineError,
    EngineInputError,
    EngineSpec,
    ModelFileError,
)

__all__ = ["CudaEngine", "CudaOptions"]


class CudaEngine:
    """See Engine. Owns the program, and closes it; the device is the caller's."""

    def __init__(
        self,
        program: Program,
        device: Device,
        platform: str,
        options: CudaOptions,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """on_close: called when nothing runs any more and everything is still there.

        Raises ModelFileError when the device has no room; then everything is given back.
        """
        self._program = program
        self._device = device
        self._on_close = on_close
        self._spec = EngineSpec(
            inputs=program.spec.inputs,
            outputs=program.spec.outputs,
            platform=platform,
            # What is computed with is a copy, of all of them.
            positional_inputs=frozenset(tensor.name for tensor in program.spec.inputs),
            overlapped_runs=options.overlapped_runs,
            run_s_max=options.run_s_max,
        )
        self._pool = PinnedPool(device, options.staging_bytes_max)
        self._instances: list[Instance] = []
        self._share: Share | None = None
        try:
            self._share = device.activations.join(program.activation_bytes, options.instances)
            for _ in range(options.instances):
                instance = Instance(program, device, self._pool, self._share, options)
                self._instances.append(instance)
        except OutOfDeviceMemory:
            raise self._no_room(options) from None
        except EngineError as error:
            self._give_back()
            raise ModelFileError(str(error)) from None
        except BaseException:
            self._give_back()
            raise
        self._slots = SlotTable(
            (instance.slots for instance in self._instances), lambda slot: slot.is_out.is_done()
        )

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    def run(
        self,
        inputs: Mapping[str, Any],
        wanted: Sequence[str],
        into: Mapping[str, Array],
    ) -> dict[str, Array]:
        """See Engine.run. Inputs may be Placed as well: they are copied on the device, and nobody
        may write them meanwhile."""
        if not wanted:
            return {}
        return self._run(self._checked(inputs, wanted, into))

    def run_batch(
        self,
        inputs: Mapping[str, Sequence[Any]],
        wanted: Sequence[str],
        receive: Callable[[Mapping[str, Array]], None],
        placements: Sequence[Placement] = (),
    ) -> None:
        """As `run`, of several requests together: each input is their parts of it, arrays or
        Placed, which are copied to where the program reads the whole. The results are given to
        `receive`, for whom they are valid until it returns; what it raises is raised.

        placements: of those requests that have tensors on the device, which must stay as they are
        until the stream that each is told of has done its work. Where nothing is on the host, and
        nobody says otherwise, this does not wait for it. One request may run so as well, in place.
        """
        whole = {name: joined(name, parts) for name, parts in inputs.items()}
        request = self._checked(whole, wanted, {})
        self._run(replace(request, receive=receive, placements=placements))

    def _run(self, request: Request) -> dict[str, Array]:
        with self._slots.taken() as slot:
            slot.is_out.wait()  # of its last run, which nobody may have waited for
            with self._device.runs.one(self._spec.run_s_max):
                return slot.instance.run(slot, request)

    def _checked(
        self, inputs: Mapping[str, Any], wanted: Sequence[str], into: Mapping[str, Array]
    ) -> Request:
        shapes = check_request(self._spec, inputs, wanted, into)
        profile = choose_profile(self._program.spec.profiles, shapes)
        if profile is None:
            raise EngineInputError(refusal(self._program.spec.profiles, shapes))
        return Request(inputs, shapes, profile, wanted, into)

    @property
    def device_uuid(self) -> str:
        return self._device.facts.uuid

    def close(self) -> None:
        """See Engine.close. What a lost device held is gone with it."""
        with contextlib.suppress(DeviceLost):
            self._on_close()
        self._give_back()

    @property
    def graph_figures(self) -> list[GraphFigures]:
        return [instance.graphs.figures for instance in self._instances]

    @property
    def staging_figures(self) -> StagingFigures:
        return self._pool.figures

    def _give_back(self) -> None:
        with contextlib.suppress(DeviceLost):
            for instance in self._instances:
                instance.close()
            self._instances.clear()
            if self._share is not None:
                self._share.close()
            self._pool.close()
            self._program.close()

    def _no_room(self, options: CudaOptions) -> ModelFileError:
        self._give_back()
        free = self._device.memory().free_bytes
        needed = options.instances * options.overlapped_runs * slot_bytes(self._program)
        activations = self._program.activation_bytes
        more = f", and a run computes in {activations} more" if activations else ""
        return ModelFileError(
            f"the model does not fit on {self._device.facts.uuid}: {free} bytes are free, the "
            f"largest inputs alone take {needed} in {options.instances} instances of "
            f"{options.overlapped_runs} overlapped runs each{more}"
        )


def slot_bytes(program: Program) -> int:
    """The device memory for the inputs of one run at their largest."""
    spec = program.spec
    return max(
        lay_out(spec.inputs, largest_shapes(spec, profile)).total_bytes
        for profile in range(max(1, len(spec.profiles)))
    )
