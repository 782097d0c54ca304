# SPDX-License-Identifier: Apache-2.0
"""A program for the twin: an ONNX graph that ONNX Runtime computes, as work of a twin's stream.

It reads and writes the twin's device memory by address, when its turn in the stream comes: whoever
copies too early or too late gets wrong results, as on a GPU. An output whose size the inputs'
shapes do not tell is an open one. A run that ONNX Runtime fails is an illegal access to a GPU's
eyes: it takes the device.
"""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from thirdrail.dtypes import BYTES
from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.cuda.device import Stream
from thirdrail_engines.cuda.program import OpenOutput, ProgramSpec
from thirdrail_engines.cuda.twin import TwinDevice, TwinStream
from thirdrail_engines.engine import EngineError, ModelFileError
from thirdrail_engines.inspector import Inspector
from thirdrail_engines.onnxruntime_engine import load_onnx
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.plans import Profile, Shape

Kernel = dict[str, tuple[int, Shape]]  # where each tensor is


class TwinProgram:
    """See Program."""

    def __init__(
        self,
        path: Path,
        device: TwinDevice,
        profiles: tuple[Profile, ...],
        inspector: Inspector,
        activation_bytes: int = 0,
    ) -> None:
        """activation_bytes: what a run writes beside its results. Raises ModelFileError for what no
        plan could be made of."""
        self.activation_bytes = activation_bytes
        self._engine = load_onnx(path, options=EngineOptions(), inspector=inspector)
        self._device = device
        spec = self._engine.spec
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.dtype is BYTES:
                raise ModelFileError(f"'{tensor.name}' is text, which no GPU computes with")
        names = {tensor.name for tensor in spec.inputs}
        if passed_on := names.intersection(tensor.name for tensor in spec.outputs):
            raise ModelFileError(
                f"'{min(passed_on)}' is input and output, a plan has one of a name"
            )
        self._symbols = _symbols(self._engine._session)
        required = tuple(tensor for tensor in spec.inputs if not tensor.optional)
        self._spec = ProgramSpec(required, spec.outputs, profiles)

    @property
    def spec(self) -> ProgramSpec:
        return self._spec

    def new_context(self, stream: Stream) -> "TwinContext":
        return TwinContext(self, self._device)

    def close(self) -> None:
        self._engine.close()

    def output_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        inputs, outputs = self._symbols
        sizes: dict[str, int] = {}
        for name, shape in shapes.items():
            sizes.update(zip(inputs[name], shape, strict=True))
        unranked = self._engine.spec.unranked
        return {
            name: (-1,)
            if name in unranked
            else tuple(dim if isinstance(dim, int) else sizes.get(dim, -1) for dim in dims)
            for name, dims in outputs.items()
        }

    def compute(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        return self._engine.run(feed, [tensor.name for tensor in self._spec.outputs], {})


class TwinContext:
    """See Context."""

    def __init__(self, program: TwinProgram, device: TwinDevice) -> None:
        self._program = program
        self._device = device
        self._inputs = {tensor.name: tensor for tensor in program.spec.inputs}
        self._outputs = {tensor.name: tensor for tensor in program.spec.outputs}
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._rooms: dict[str, OpenOutput] = {}
        self.activation_bytes = program.activation_bytes
        self._activations = 0
        self.enqueued = 0

    def prepare(
        self, profile: int, shapes: Mapping[str, Shape], stream: Stream
    ) -> dict[str, Shape]:
        assert self._device.is_current, "a library is called on a thread without the device"
        outputs = self._program.output_shapes(shapes)
        self._shapes = {**shapes, **outputs}
        self._addresses.clear()
        self._rooms.clear()
        return outputs

    def bind(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def bind_open(self, output: str, room: OpenOutput) -> None:
        self._rooms[output] = room

    def use_activations(self, address: int) -> None:
        self._activations = address

    def can_record(self, stream: Stream) -> bool:
        return not self._rooms

    def enqueue(self, stream: Stream) -> None:
        assert isinstance(stream, TwinStream)
        self._device.enter("cuLaunchKernel")
        self.enqueued += 1
        if missing := self._shapes.keys() - self._addresses.keys() - self._rooms.keys():
            raise EngineError(f"no address was set for {sorted(missing)}")
        places = {name: (address, self._shapes[name]) for name, address in self._addresses.items()}
        results: dict[str, Array] = {}
        activations, self._activations = self._activations, 0
        stream.give(lambda: self._kernel(places, activations, results))
        if self._rooms:
            assert not stream.is_capturing
            stream.synchronize()  # TensorRT has to wait as well before it can tell sizes
            self._fill_open(stream, results)

    def close(self) -> None: ...

    def _kernel(self, places: Kernel, activations: int, results: dict[str, Array]) -> None:
        feed = {
            name: self._memory(tensor, *places[name]).copy()
            for name, tensor in self._inputs.items()
        }
        with self._computing_in(activations):
            results.update(self._program.compute(feed))
        for name, tensor in self._outputs.items():
            if name in places:
                self._memory(tensor, *places[name])[...] = results[name]

    @contextmanager
    def _computing_in(self, address: int) -> Iterator[None]:
        """As kernels do: what they wrote there they read again."""
        if not self.activation_bytes:
            yield
            return
        memory = self._device.memory_at(address, self.activation_bytes, "cuLaunchKernel")
        mark = np.frombuffer(uuid.uuid4().bytes, np.uint8)
        written = np.resize(mark, self.activation_bytes)
        memory[:] = written
        yield
        if not (memory == written).all():
            raise EngineError("somebody else wrote to the memory that a run computed in")

    def _memory(self, tensor: TensorSpec, address: int, shape: Shape) -> Array:
        assert tensor.dtype.numpy is not None
        nbytes = int(np.prod(shape)) * tensor.dtype.itemsize
        memory = self._device.memory_at(address, nbytes, "cuLaunchKernel")
        return memory.view(tensor.dtype.numpy).reshape(shape)

    def _fill_open(self, stream: TwinStream, results: Mapping[str, Array]) -> None:
        for name, room in self._rooms.items():
            result = results[name]
            address = room.reserve(max(result.nbytes, 1))
            room.tell(result.shape)
            if not address:
                raise EngineError(f"there is no memory for output '{name}'")
            stream.give(lambda *_, a=address, r=result, t=self._outputs[name]: self._put(t, a, r))

    def _put(self, tensor: TensorSpec, address: int, result: Array) -> None:
        self._memory(tensor, address, result.shape)[...] = result


def _symbols(session: Any) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Dimensions of inputs and outputs as the graph has them: sizes, names, None."""
    return (
        {value.name: value.shape for value in session.get_inputs()},
        {value.name: value.shape for value in session.get_outputs()},
    )
