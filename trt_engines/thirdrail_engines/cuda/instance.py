# SPDX-License-Identifier: Apache-2.0
"""One execution of a program at a time, with the copies of others beside it."""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from thirdrail.tensors import Array
from thirdrail_engines.cuda.activations import Share
from thirdrail_engines.cuda.capture import captured
from thirdrail_engines.cuda.device import Device, Graph, Stream
from thirdrail_engines.cuda.graph_cache import GraphCache, Way
from thirdrail_engines.cuda.layout import Layout, lay_out
from thirdrail_engines.cuda.open_output import GrowingOutput
from thirdrail_engines.cuda.options import CudaOptions
from thirdrail_engines.cuda.placed import Inputs, Placement, of_host, sizes_of
from thirdrail_engines.cuda.program import Context, Program, largest_shapes
from thirdrail_engines.cuda.request import Request
from thirdrail_engines.cuda.slot import Slot
from thirdrail_engines.cuda.staging import PinnedPool
from thirdrail_engines.cuda.transfers import Transfers
from thirdrail_engines.engine import EngineError
from thirdrail_engines.plans import Shape

# Below this, events between streams cost more than an overlapped copy would save. A guess: not yet
# measured on a GPU.
OVERLAP_BYTES_MIN = 256 << 10


@dataclass(frozen=True, slots=True)
class _Recording:
    graph: Graph
    outputs: dict[str, Shape]


class Instance:
    """One context. Runs stage and collect side by side; one at a time, whoever has the lock, talks
    to the context and to the stream that computes: what others gave it meanwhile would become part
    of a recording.
    """

    def __init__(
        self,
        program: Program,
        device: Device,
        pool: PinnedPool,
        share: Share,
        options: CudaOptions,
    ) -> None:
        self._spec = program.spec
        self._device = device
        self._pool = pool
        self._share = share
        self._options = options
        self._lock = threading.Lock()
        self.graphs: GraphCache[_Recording] = GraphCache(options.graphs_max)
        self.slots: list[Slot] = []
        self._context: Context | None = None
        self._streams: list[Stream] = []
        try:
            for _ in range(3):
                self._streams.append(device.new_stream())
            self._context = program.new_context(self._compute)
            sizes = self._block_sizes(self._context)
            for _ in range(options.overlapped_runs):
                self.slots.append(Slot(self, device, sizes))
        except BaseException:
            self.close()
            raise

    @property
    def _compute(self) -> Stream:
        return self._streams[1]

    def run(self, slot: Slot, request: Request) -> dict[str, Array]:
        """Wait for the results; none come back where the request receives them.

        Raises EngineError, DeviceLost, and what `request.receive` raises.
        """
        layout = lay_out(self._spec.inputs, request.shapes)
        into_device, compute, out_of_device = self._streams_for(layout.total_bytes)
        transfers = Transfers(self._pool, request)
        try:
            copy_in = transfers.stage(self._spec.inputs, layout, slot.input_block)
            if into_device is not compute:
                copy_in(into_device)
                into_device.record(slot.is_in)
            with self._lock:
                if into_device is compute:
                    copy_in(compute)
                else:
                    compute.wait(slot.is_in)
                with self._share.lent(compute) as memory:
                    shapes = self._calculate(slot, request, layout, memory)
                if out_of_device is not compute:
                    compute.record(slot.is_computed)
                    out_of_device.wait(slot.is_computed)
                sources = slot.sources(self._spec.outputs, shapes)
                results = transfers.fetch(self._spec.outputs, shapes, sources, out_of_device)
                out_of_device.record(slot.is_out)
            slot.is_out.wait()
            if request.receive is None:
                return results()
            request.receive(results())
            return {}
        except BaseException:
            self._quiesce()
            raise
        finally:
            transfers.close()

    def run_placed(
        self, slot: Slot, request: Request, placement: Placement
    ) -> dict[str, Array | Shape]:
        """See CudaEngine.run_placed. All on the stream that computes: what this slot's next run
        does there comes after it, so that nobody has to wait while nothing is on the host."""
        specs, stream = self._spec, self._compute
        inputs = Inputs.of(specs.inputs, request.inputs)
        host = of_host(request, inputs.host, placement.on_device)
        layout = lay_out(inputs.staged(specs.inputs), request.shapes)
        transfers = Transfers(self._pool, host)
        results: dict[str, Array | Shape] = {}
        try:
            copy_in = (
                transfers.stage(inputs.host, layout, slot.input_block) if inputs.host else None
            )
            with self._lock:
                if copy_in is not None:
                    copy_in(stream)
                for name, tensor in inputs.copied.items():
                    if tensor.nbytes:
                        target = slot.input_block + layout.offsets[name]
                        stream.copy(target, tensor.address, tensor.nbytes)
                with self._share.lent(stream) as memory:
                    shapes, is_at_rest = self._calculate_placed(
                        slot, request, inputs, layout, placement, memory
                    )
                sources = slot.sources(specs.outputs, shapes)
                fetched = None
                if host.wanted:
                    fetched = transfers.fetch(specs.outputs, shapes, sources, stream)
                placement.given(stream)
                stream.record(slot.is_out)
            if inputs.host or inputs.copied or not is_at_rest or fetched is not None:
                slot.is_out.wait()
            if fetched is not None:
                results.update(fetched())
            return results | {name: shapes[name] for name in placement.on_device}
        except BaseException:
            self._quiesce()
            raise
        finally:
            transfers.close()

    def _calculate_placed(
        self,
        slot: Slot,
        request: Request,
        inputs: Inputs,
        layout: Layout,
        placement: Placement,
        memory: int,
    ) -> tuple[dict[str, Shape], bool]:
        """Give the run to the device. Returns the outputs' shapes, and whether the slot's memory
        stays where it is: not where only the run tells how large an output is, for which the next
        run may need more. Such are copied to where they stay. Never by a graph, which would have to
        be recorded for each address."""
        slot.begin()
        context = self._context
        assert context is not None
        outputs = context.prepare(request.profile, request.shapes, self._compute)
        rooms = self._bind(context, slot, layout, outputs)
        for name, tensor in inputs.bound.items():
            context.bind(name, tensor.address)
        specs, on_device = self._spec.outputs, placement.on_device
        is_copied = any(name in rooms for name in on_device)
        if on_device and not is_copied:
            for name, address in placement.place(sizes_of(specs, outputs, on_device)).items():
                context.bind(name, address)
        self._enqueue(context, rooms, memory)
        shapes = outputs | {name: room.shape for name, room in rooms.items()}
        if is_copied:
            sources, sizes = slot.sources(specs, shapes), sizes_of(specs, shapes, on_device)
            for name, address in placement.place(sizes).items():
                if sizes[name]:
                    self._compute.copy(address, sources[name], sizes[name])
        return shapes, not rooms

    def close(self) -> None:
        """Waits for what `run_placed` has left under way: memory in use must not be freed."""
        for stream in self._streams:
            with contextlib.suppress(EngineError):  # of a run that is over
                stream.synchronize()
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

    def _calculate(
        self, slot: Slot, request: Request, layout: Layout, memory: int
    ) -> dict[str, Shape]:
        """Give the run to the device. Returns the outputs' shapes."""
        # A graph holds the addresses of all memory that it was recorded with.
        key = (slot.input_block, memory, request.profile, tuple(request.shapes.values()))
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
        self._enqueue(context, rooms, memory)
        if way is Way.RECORD:
            self._record(context, key, outputs, lambda: self._give(context, memory))
        return outputs | {name: room.shape for name, room in rooms.items()}

    def _bind(
        self, context: Context, slot: Slot, layout: Layout, outputs: Mapping[str, Shape]
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

    def _enqueue(self, context: Context, rooms: Mapping[str, GrowingOutput], memory: int) -> None:
        try:
            self._give(context, memory)
        except EngineError:
            self._device.check()  # the cause, if that is it
            for name, room in rooms.items():
                if room.fault is not None:
                    raise EngineError(f"output '{name}': {room.fault}") from None
            raise

    def _give(self, context: Context, memory: int) -> None:
        if memory:
            context.use_activations(memory)
        context.enqueue(self._compute)

    def _record(
        self, context: Context, key: object, outputs: dict[str, Shape], give: Callable[[], None]
    ) -> None:
        """Record what has just run. A failure costs the graph and not the run."""
        if -1 in {dim for shape in outputs.values() for dim in shape} or not context.can_record(
            self._compute
        ):
            return self.graphs.refuse(key)
        graph = captured(self._device, self._compute, give)
        if graph is None:
            return self.graphs.refuse(key)
        for recording in self.graphs.keep(key, _Recording(graph, outputs)):
            recording.graph.close()  # one that is under way is freed when it is done

    def _quiesce(self) -> None:
        """After a failure: nothing may still copy from or to memory that is about to be given
        back. Raises DeviceLost."""
        with self._lock:  # or it would meet a recording
            for stream in self._streams:
                stream.synchronize()


def _closed(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {name: shape for name, shape in shapes.items() if -1 not in shape}
