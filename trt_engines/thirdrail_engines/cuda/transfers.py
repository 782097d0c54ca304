# SPDX-License-Identifier: Apache-2.0
"""A run's tensors between the caller's arrays and the device, by way of pinned memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.cuda.device import PinnedMemory, Stream
from thirdrail_engines.cuda.layout import Layout, lay_out
from thirdrail_engines.cuda.parts import parts_of
from thirdrail_engines.cuda.placed import spans_for_host
from thirdrail_engines.cuda.request import Request
from thirdrail_engines.cuda.staging import PinnedPool
from thirdrail_engines.plans import Shape


class Transfers:
    """Of one run. Close it when nothing is under way any more."""

    def __init__(self, pool: PinnedPool, request: Request) -> None:
        self._pool = pool
        self._request = request
        self._blocks: list[PinnedMemory] = []
        self.are_awaited = request.is_awaited

    def stage(
        self, inputs: Sequence[TensorSpec], layout: Layout, target: int
    ) -> Callable[[Stream], None]:
        """Copy the inputs into pinned memory, except for what is on the device. Returns what copies
        them on, to `target` on the device."""
        pieces = [
            _Piece(tensor, layout.offsets[tensor.name] + offset, part)
            for tensor in inputs
            for offset, part in parts_of(self._request.inputs[tensor.name])
        ]
        on_host = [piece for piece in pieces if isinstance(piece.source, np.ndarray)]
        self.are_awaited = self.are_awaited or bool(on_host)  # whose memory is in use
        block = self._lend(layout.total_bytes) if on_host else None
        if block is None:
            return lambda stream: _copy_directly(pieces, target, stream)
        for piece in on_host:
            place = _view(block, piece.tensor, piece.offset, piece.source.shape)
            np.copyto(place, _sound(piece.source))
        if len(on_host) == len(pieces):
            return lambda stream: stream.copy_in(target, block.address, layout.total_bytes)
        return lambda stream: _copy_mixed(pieces, block, target, stream)

    def fetch(
        self,
        outputs: tuple[TensorSpec, ...],
        shapes: Mapping[str, Shape],
        sources: Mapping[str, int],
        stream: Stream,
    ) -> Callable[[], dict[str, Array]]:
        """Begin to copy the wanted results from where they are on the device. Returns what makes
        arrays of them when that is done: views of pinned memory where the request receives them,
        without the rows that stay on the device. Raises EngineError when one does not fit its
        array."""
        self._request.check_results(shapes)
        wanted = [tensor for tensor in outputs if tensor.name in self._request.wanted]
        layout = lay_out(wanted, shapes)
        block = self._lend(layout.total_bytes) if wanted else None
        results: dict[str, Array] = {}
        for tensor in wanted:
            offset, shape = layout.offsets[tensor.name], shapes[tensor.name]
            if block is not None and self._request.receive is not None:
                target = _view(block, tensor, offset, shape)
            else:
                target = self._request.target(tensor, shape)
            results[tensor.name] = target
            place = _address(target) if block is None else block.address + offset
            spans = spans_for_host(self._request.placements, tensor.name, target.nbytes)
            for start, stop in spans:
                stream.copy_out(place + start, sources[tensor.name] + start, stop - start)

        def collect() -> dict[str, Array]:
            is_there = block is None or self._request.receive is not None
            for tensor in () if is_there else wanted:
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


@dataclass(frozen=True, slots=True)
class _Piece:
    """Of an input. offset: in the block of all inputs, in bytes. source: Array, or Placed."""

    tensor: TensorSpec
    offset: int
    source: Any


def _copy_mixed(pieces: Sequence[_Piece], block: PinnedMemory, target: int, stream: Stream) -> None:
    for piece in pieces:
        place, nbytes = target + piece.offset, piece.source.nbytes
        if not nbytes:
            continue
        if isinstance(piece.source, np.ndarray):
            stream.copy_in(place, block.address + piece.offset, nbytes)
        else:
            stream.copy(place, piece.source.address, nbytes)


def _copy_directly(pieces: Sequence[_Piece], target: int, stream: Stream) -> None:
    made = []
    for piece in pieces:
        place, source = target + piece.offset, piece.source
        if not source.nbytes:
            continue
        if not isinstance(source, np.ndarray):
            stream.copy(place, source.address, source.nbytes)
            continue
        array = _sound(source)
        if array is not source:
            made.append(array)
        stream.copy_in(place, _address(array), array.nbytes)
    if made:
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
