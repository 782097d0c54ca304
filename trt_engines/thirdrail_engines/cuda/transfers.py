# SPDX-License-Identifier: Apache-2.0
"""A run's tensors between the caller's arrays and the device, by way of pinned memory."""

from collections.abc import Callable, Mapping

import numpy as np

from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.cuda.device import PinnedMemory, Stream
from thirdrail_engines.cuda.layout import Layout, lay_out
from thirdrail_engines.cuda.request import Request
from thirdrail_engines.cuda.staging import PinnedPool
from thirdrail_engines.plans import Shape


class Transfers:
    """Of one run. Close it when nothing is under way any more."""

    def __init__(self, pool: PinnedPool, request: Request) -> None:
        self._pool = pool
        self._request = request
        self._blocks: list[PinnedMemory] = []

    def stage(
        self, inputs: tuple[TensorSpec, ...], layout: Layout, target: int
    ) -> Callable[[Stream], None]:
        """Copy the inputs into pinned memory. Returns what copies them on, to `target` on the
        device."""
        block = self._lend(layout.total_bytes)
        if block is None:
            return lambda stream: self._copy_directly(layout, target, stream)
        for tensor in inputs:
            source = self._request.inputs[tensor.name]
            place = _view(block, tensor, layout.offsets[tensor.name], source.shape)
            np.copyto(place, _sound(source))
        return lambda stream: stream.copy_in(target, block.address, layout.total_bytes)

    def fetch(
        self,
        outputs: tuple[TensorSpec, ...],
        shapes: Mapping[str, Shape],
        sources: Mapping[str, int],
        stream: Stream,
    ) -> Callable[[], dict[str, Array]]:
        """Begin to copy the wanted results from where they are on the device. Returns what makes
        arrays of them when that is done. Raises EngineError when one does not fit its array."""
        self._request.check_results(shapes)
        wanted = [tensor for tensor in outputs if tensor.name in self._request.wanted]
        layout = lay_out(wanted, shapes)
        block = self._lend(layout.total_bytes)
        results: dict[str, Array] = {}
        for tensor in wanted:
            target = self._request.target(tensor, shapes[tensor.name])
            results[tensor.name] = target
            place = _address(target)
            if block is not None:
                place = block.address + layout.offsets[tensor.name]
            if target.nbytes:
                stream.copy_out(place, sources[tensor.name], target.nbytes)

        def collect() -> dict[str, Array]:
            for tensor in wanted if block is not None else ():
                assert block is not None
                array = results[tensor.name]
                np.copyto(array, _view(block, tensor, layout.offsets[tensor.name], array.shape))
            return {name: results[name] for name in self._request.wanted}

        return collect

    def close(self) -> None:
        while self._blocks:
            self._pool.give_back(self._blocks.pop())

    def _lend(self, nbytes: int) -> PinnedMemory | None:
        block = self._pool.lend(nbytes)
        if block is not None:
            self._blocks.append(block)
        return block

    def _copy_directly(self, layout: Layout, target: int, stream: Stream) -> None:
        inputs = self._request.inputs
        kept = {name: _sound(array) for name, array in inputs.items()}
        for name, array in kept.items():
            if array.nbytes:
                stream.copy_in(target + layout.offsets[name], _address(array), array.nbytes)
        if any(kept[name] is not array for name, array in inputs.items()):
            stream.synchronize()  # before what was made here is gone


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
