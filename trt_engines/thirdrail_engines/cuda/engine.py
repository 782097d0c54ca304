# SPDX-License-Identifier: Apache-2.0
"""The engine that runs a program on a device.

Per instance one context and three streams: inputs go in on one, the program computes on the second,
results come out on the third, and events join them. So the copies of one run overlap the computing
of another. A run takes one of the instance's slots, which holds its memory on the device, and
waits on its own thread until the last copy is done; other threads run meanwhile.

Copies of a tensor's bytes: caller -> pinned memory -> device -> pinned memory -> result. The first
is the snapshot: nobody can change what is computed with. Where pinned memory is short, the driver
copies from and to the caller's memory itself.

All device memory but that of open outputs is taken when the engine is made, for the largest shapes
of the profiles: a request does not fail for lack of it.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.cuda.device import Device, Graph, PinnedMemory, Stream
from thirdrail_engines.cuda.errors import OutOfDeviceMemory
from thirdrail_engines.cuda.graph_cache import GraphCache, GraphFigures, Way
from thirdrail_engines.cuda.layout import Layout, lay_out
from thirdrail_engines.cuda.open_output import GrowingOutput
from thirdrail_engines.cuda.program import (
    Context,
    Program,
    choose_profile,
    largest_shapes,
    refusal,
)
from thirdrail_engines.cuda.request import Request, check_request
from thirdrail_engines.cuda.slots import SlotTable
from thirdrail_engines.cuda.staging import PinnedPool, StagingFigures
from thirdrail_engines.engine import DeviceLost, EngineError, EngineSpec, ModelFileError
from thirdrail_engines.plans import Shape

# Below this, events between streams cost more than an overlapped copy would save.
OVERLAP_BYTES_MIN = 256 << 10


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """What a server decides about an engine on a device.

    staging_bytes_max: of pinned host memory. graphs_max: per instance; 0 for none, also where the
    program records graphs by itself. open_output_bytes_max: of each open output of a run.
    """

    instances: int = 1
    overlapped_runs: int = 2  # of each instance
    staging_bytes_max: int = 256 << 20
    graphs_max: int = 32
    open_output_bytes_max: int = 1 << 30

    def __post_init__(self) -> None:
        if min(self.instances, self.overlapped_runs) < 1:
            raise ValueError(
                f"{self.instances} instances of {self.overlapped_runs} overlapped runs, expected "
                "at least 1 of each"
            )


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
        )
        self._pool = PinnedPool(device, options.staging_bytes_max)
        self._instances: list[_Instance] = []
        try:
            for _ in range(options.instances):
                self._instances.append(_Instance(program, device, self._pool, options))
        except OutOfDeviceMemory:
            raise self._no_room(options) from None
        except EngineError as error:
            self._give_back()
            raise ModelFileError(str(error)) from None
        except BaseException:
            self._give_back()
            raise
        self._slots = SlotTable(instance.slots for instance in self._instances)

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    def run(
        self,
        inputs: Mapping[str, Array],
        wanted: Sequence[str],
        into: Mapping[str, Array],
    ) -> dict[str, Array]:
        """See Engine.run."""
        if not wanted:
            return {}
        shapes = check_request(self._spec, inputs, wanted, into)
        profile = choose_profile(self._program.spec.profiles, shapes)
        if profile is None:
            raise EngineError(refusal(self._program.spec.profiles, shapes))
        request = Request(inputs, shapes, profile, wanted, into)
        with self._slots.taken() as slot:
            return slot.instance.run(slot, request)

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
            self._pool.close()
            self._program.close()

    def _no_room(self, options: CudaOptions) -> ModelFileError:
        self._give_back()
        free = self._device.memory().free_bytes
        needed = options.instances * options.overlapped_runs * slot_bytes(self._program)
        return ModelFileError(
            f"the model does not fit on {self._device.facts.uuid}: {free} bytes are free, the "
            f"largest inputs alone take {needed} in {options.instances} instances of "
            f"{options.overlapped_runs} overlapped runs each"
        )


def slot_bytes(program: Program) -> int:
    """The device memory for the inputs of one run at their largest."""
    spec = program.spec
    return max(
        lay_out(spec.inputs, largest_shapes(spec, profile)).total_bytes
        for profile in range(max(1, len(spec.profiles)))
    )


class _Slot:
    """Memory and events of one run at a time."""

    def __init__(self, instance: "_Instance", device: Device, sizes: tuple[int, int]) -> None:
        self.instance = instance
        self._device = device
        self._blocks: list[int] = []
        self.rooms: dict[str, GrowingOutput] = {}
        self.is_in, self.is_computed, self.is_out = (device.new_event() for _ in range(3))
        self.output_bytes = sizes[1]
        try:
            for size in sizes:
                self._blocks.append(device.allocate(size))
        except EngineError:
            self.close()
            raise

    def begin(self) -> None:
        for room in self.rooms.values():
            room.begin()

    @property
    def input_block(self) -> int:
        return self._blocks[0]

    @property
    def output_block(self) -> int:
        return self._blocks[1]

    def room(self, name: str, bytes_max: int) -> GrowingOutput:
        if name not in self.rooms:
            self.rooms[name] = GrowingOutput(self._device, bytes_max)
        return self.rooms[name]

    def close(self) -> None:
        for room in self.rooms.values():
            room.close()
        for block in self._blocks:
            self._device.free(block)
        for event in (self.is_in, self.is_computed, self.is_out):
            event.close()


@dataclass(frozen=True, slots=True)
class _Recording:
    graph: Graph
    outputs: dict[str, Shape]


class _Instance:
    """One context. Runs stage and collect side by side; one at a time, whoever has the lock, talks
    to the context and to the stream that computes: what others gave it meanwhile would become part
    of a recording.
    """

    def __init__(
        self, program: Program, device: Device, pool: PinnedPool, options: CudaOptions
    ) -> None:
        self._spec = program.spec
        self._device = device
        self._pool = pool
        self._options = options
        self._lock = threading.Lock()
        self.graphs: GraphCache[_Recording] = GraphCache(options.graphs_max)
        self.slots: list[_Slot] = []
        self._context: Context | None = None
        self._streams: list[Stream] = []
        try:
            self._streams = [device.new_stream() for _ in range(3)]
            self._context = program.new_context(self._compute)
            sizes = self._block_sizes(self._context)
            for _ in range(options.overlapped_runs):
                self.slots.append(_Slot(self, device, sizes))
        except BaseException:
            self.close()
            raise

    @property
    def _compute(self) -> Stream:
        return self._streams[1]

    def run(self, slot: _Slot, request: Request) -> dict[str, Array]:
        layout = lay_out(self._spec.inputs, request.shapes)
        blocks: list[PinnedMemory] = []
        try:
            into_device, compute, out_of_device = self._streams_for(layout.total_bytes)
            copy_in = self._stage(slot, request, layout, blocks)
            if into_device is not compute:
                copy_in(into_device)
                into_device.record(slot.is_in)
            with self._lock:
                if into_device is compute:
                    copy_in(compute)
                else:
                    compute.wait(slot.is_in)
                outputs = self._calculate(slot, request, layout)
                if out_of_device is not compute:
                    compute.record(slot.is_computed)
                    out_of_device.wait(slot.is_computed)
                results = self._copy_out(slot, request, outputs, out_of_device, blocks)
            slot.is_out.wait()
            return results()
        except BaseException:
            self._quiesce()
            raise
        finally:
            for block in blocks:
                self._pool.give_back(block)

    def close(self) -> None:
        for recording in self.graphs.clear():
            recording.graph.close()
        for slot in self.slots:
            slot.close()
        if self._context is not None:
            self._context.close()
        for stream in self._streams:
            stream.close()

    def _streams_for(self, input_bytes: int) -> Sequence[Stream]:
        if input_bytes >= OVERLAP_BYTES_MIN:
            return self._streams
        return [self._compute] * 3

    def _block_sizes(self, context: Context) -> tuple[int, int]:
        """The bytes that the inputs and the outputs of a run take at most."""
        inputs, outputs = 1, 1
        for profile in range(max(1, len(self._spec.profiles))):
            shapes = largest_shapes(self._spec, profile)
            inputs = max(inputs, lay_out(self._spec.inputs, shapes).total_bytes)
            found = context.prepare(profile, shapes, self._compute)
            outputs = max(outputs, lay_out(self._spec.outputs, _closed(found)).total_bytes)
        return inputs, outputs

    def _stage(
        self, slot: _Slot, request: Request, layout: Layout, blocks: list[PinnedMemory]
    ) -> Callable[[Stream], None]:
        """Copy the inputs into pinned memory. Returns what copies them on to the device."""
        block = self._pool.lend(layout.total_bytes)
        if block is None:
            return lambda stream: self._copy_directly(slot, request, layout, stream)
        blocks.append(block)
        for tensor in self._spec.inputs:
            source = request.inputs[tensor.name]
            target = _view(block, tensor, layout.offsets[tensor.name], source.shape)
            np.copyto(target, _sound(source))
        return lambda stream: stream.copy_in(slot.input_block, block.address, layout.total_bytes)

    def _copy_directly(self, slot: _Slot, request: Request, layout: Layout, stream: Stream) -> None:
        kept = {name: _sound(array) for name, array in request.inputs.items()}
        for name, array in kept.items():
            if array.nbytes:
                stream.copy_in(
                    slot.input_block + layout.offsets[name], _address(array), array.nbytes
                )
        if any(kept[name] is not array for name, array in request.inputs.items()):
            stream.synchronize()  # before what was made here is gone

    def _calculate(self, slot: _Slot, request: Request, layout: Layout) -> dict[str, Shape]:
        """Give the run to the device. Returns the outputs' shapes."""
        key = (slot.input_block, request.profile, tuple(request.shapes.values()))
        slot.begin()
        way = self.graphs.way(key)
        if way is Way.LAUNCH:
            recording = self.graphs.graph(key)
            self._compute.launch(recording.graph)
            return recording.outputs
        context = self._context
        assert context is not None
        outputs = context.prepare(request.profile, request.shapes, self._compute)
        rooms = self._bind(context, slot, layout, outputs)
        self._enqueue(context, rooms)
        if way is Way.RECORD:
            self._record(context, key, outputs)
        return outputs | {name: room.shape for name, room in rooms.items()}

    def _bind(
        self, context: Context, slot: _Slot, layout: Layout, outputs: Mapping[str, Shape]
    ) -> dict[str, GrowingOutput]:
        for name, offset in layout.offsets.items():
            context.bind(name, slot.input_block + offset)
        closed = _closed(outputs)
        results = lay_out(self._spec.outputs, closed)
        if results.total_bytes > slot.output_bytes:
            raise EngineError(
                f"the results take {results.total_bytes} bytes, and at the largest shapes of the "
                f"profiles {slot.output_bytes}: give a profile of its own to these shapes"
            )
        for name, offset in results.offsets.items():
            context.bind(name, slot.output_block + offset)
        rooms = {}
        for name in outputs.keys() - closed.keys():
            rooms[name] = slot.room(name, self._options.open_output_bytes_max)
            rooms[name].begin()
            context.bind_open(name, rooms[name])
        return rooms

    def _enqueue(self, context: Context, rooms: Mapping[str, GrowingOutput]) -> None:
        try:
            context.enqueue(self._compute)
        except EngineError:
            self._device.check()  # the cause, if that is it
            for name, room in rooms.items():
                if room.fault is not None:
                    raise EngineError(f"output '{name}': {room.fault}") from None
            raise

    def _record(self, context: Context, key: object, outputs: dict[str, Shape]) -> None:
        """Record what has just run. A failure costs the graph and not the run."""
        if -1 in {dim for shape in outputs.values() for dim in shape} or not context.can_record(
            self._compute
        ):
            return self.graphs.refuse(key)
        graph = self._captured(context)
        if graph is None:
            return self.graphs.refuse(key)
        for recording in self.graphs.keep(key, _Recording(graph, outputs)):
            recording.graph.close()  # one that is under way is freed when it is done

    def _captured(self, context: Context) -> Graph | None:
        """None: it cannot be captured. Raises DeviceLost."""
        try:
            self._compute.begin_capture()
        except EngineError:
            return None
        is_enqueued = True
        try:
            context.enqueue(self._compute)
        except EngineError:
            is_enqueued = False
        try:
            graph = self._compute.end_capture()  # in any case: nothing else runs before that
        except EngineError:
            graph = None
        if is_enqueued or graph is None:
            return graph
        graph.close()
        self._device.check()
        return None

    def _copy_out(
        self,
        slot: _Slot,
        request: Request,
        outputs: Mapping[str, Shape],
        stream: Stream,
        blocks: list[PinnedMemory],
    ) -> Callable[[], dict[str, Array]]:
        """Begin to copy the results. Returns what makes arrays of them when that is done."""
        request.check_results(outputs)
        wanted = {name: outputs[name] for name in request.wanted}
        sources = self._sources(slot, outputs)
        layout = lay_out(self._spec.outputs, wanted)
        block = self._pool.lend(layout.total_bytes)
        results: dict[str, Array] = {}
        if block is not None:
            blocks.append(block)
        for tensor in self._spec.outputs:
            if tensor.name not in wanted:
                continue
            target = request.target(tensor, wanted[tensor.name])
            results[tensor.name] = target
            if not target.nbytes:
                continue
            place = _address(target)
            if block is not None:
                place = block.address + layout.offsets[tensor.name]
            stream.copy_out(place, sources[tensor.name], target.nbytes)
        stream.record(slot.is_out)

        def collect() -> dict[str, Array]:
            if block is not None:
                for tensor in self._spec.outputs:
                    if tensor.name in results:
                        array = results[tensor.name]
                        offset = layout.offsets[tensor.name]
                        np.copyto(array, _view(block, tensor, offset, array.shape))
            return {name: results[name] for name in request.wanted}

        return collect

    def _sources(self, slot: _Slot, outputs: Mapping[str, Shape]) -> dict[str, int]:
        """Where each output is on the device. As `_bind` has it: open ones have rooms."""
        rooms = {name: room.address for name, room in slot.rooms.items() if room.is_told}
        closed = {name: shape for name, shape in outputs.items() if name not in rooms}
        offsets = lay_out(self._spec.outputs, closed).offsets
        return rooms | {name: slot.output_block + offset for name, offset in offsets.items()}

    def _quiesce(self) -> None:
        """After a failure: nothing may still copy from or to memory that is about to be given
        back. Raises DeviceLost."""
        with self._lock:  # or it would meet a recording
            for stream in self._streams:
                stream.synchronize()


def _closed(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {name: shape for name, shape in shapes.items() if -1 not in shape}


def _sound(array: Array) -> Array:
    """Booleans that are surely 0 or 1: to a kernel, any other byte is undefined."""
    return array if array.dtype != np.bool_ else np.not_equal(array.view(np.uint8), 0)


def _view(block: PinnedMemory, tensor: TensorSpec, offset: int, shape: Shape) -> Array:
    assert tensor.dtype.numpy is not None
    size = int(np.prod(shape)) * tensor.dtype.itemsize
    return block.view[offset : offset + size].view(tensor.dtype.numpy).reshape(shape)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
