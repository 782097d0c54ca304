# SPDX-License-Identifier: Apache-2.0
"""One execution of a program at a time, with the copies of others beside it."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from thirdrail.tensors import Array
from thirdrail_engines.cuda.activations import Share
from thirdrail_engines.cuda.capture import captured
from thirdrail_engines.cuda.device import Device, Graph, Stream
from thirdrail_engines.cuda.graph_cache import GraphCache, Way
from thirdrail_engines.cuda.layout import Layout, lay_out
from thirdrail_engines.cuda.open_output import GrowingOutput
from thirdrail_engines.cuda.options import CudaOptions
from thirdrail_engines.cuda.placed import Piece, Placed, pieces_of
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
        """Wait for what is to be on the host; none of it comes back where the request receives it.

        Raises EngineError, DeviceLost, and what the request's callbacks raise.
        """
        outputs, bound = self._spec.outputs, request.bound_inputs(self._spec.inputs)
        staged = [tensor for tensor in self._spec.inputs if tensor.name not in bound]
        layout = lay_out(staged, request.shapes)
        into_device, compute, out_of_device = self._streams_for(layout.total_bytes)
        transfers = Transfers(self._pool, request)
        try:
            copy_in = transfers.stage(staged, layout, slot.input_block)
            if into_device is not compute:
                copy_in(into_device)
                into_device.record(slot.is_in)
            with self._lock:
                if into_device is compute:
                    copy_in(compute)
                else:
                    compute.wait(slot.is_in)
                with self._share.lent(compute) as memory:
                    if request.alone is None:
                        shapes = self._calculate(slot, request, layout, memory)
                    else:
                        shapes = self._calculate_in_place(slot, request, bound, layout, memory)
                if out_of_device is not compute:
                    compute.record(slot.is_computed)
                    out_of_device.wait(slot.is_computed)
                sources = slot.sources(outputs, shapes)
                results = transfers.fetch(outputs, shapes, sources, out_of_device)
                for placement in request.placements:
                    if placement is not request.alone:
                        pieces = pieces_of(placement, outputs, shapes, sources)
                        _copy(pieces, out_of_device)
                    placement.given(out_of_device)
                out_of_device.record(slot.is_out)
            if transfers.are_awaited:
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

    def close(self) -> None:
        """Waits for what runs have left under way: memory in use must not be freed."""
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

    def _calculate_in_place(
        self,
        slot: Slot,
        request: Request,
        bound: Mapping[str, Placed],
        layout: Layout,
        memory: int,
    ) -> dict[str, Shape]:
        """As `_calculate`, of a request that runs alone, with its tensors where they are. Results
        whose sizes only the run tells are copied there. Never by a graph, which would have to be
        recorded for each address."""
        slot.begin()
        context, alone, specs = self._context, request.alone, self._spec.outputs
        assert context is not None
        assert alone is not None
        outputs = context.prepare(request.profile, request.shapes, self._compute)
        rooms = self._bind(context, slot, layout, outputs)
        for name, tensor in bound.items():
            context.bind(name, tensor.address)
        kept = {name: outputs[name] for name in alone.on_device}
        is_placed = not rooms.keys() & kept.keys()
        if kept and is_placed:
            for name, address in (alone.place(kept) or {}).items():
                context.bind(name, address)
        self._enqueue(context, rooms, memory)
        shapes = outputs | {name: room.shape for name, room in rooms.items()}
        if not is_placed:
            sources = slot.sources(specs, shapes)
            _copy(pieces_of(alone, specs, shapes, sources), self._compute)
        return shapes

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


def _copy(pieces: Iterable[Piece], stream: Stream) -> None:
    for piece in pieces:
        stream.copy(piece.target, piece.source, piece.nbytes)


def _closed(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {name: shape for name, shape in shapes.items() if -1 not in shape}
