# SPDX-License-Identifier: Apache-2.0
"""One call of an engine on a device, checked before anything is copied. Pure code."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.cuda.placed import Placed, Placement
from thirdrail_engines.engine import EngineError, EngineSpec
from thirdrail_engines.plans import Shape


@dataclass(frozen=True, slots=True)
class Request:
    """inputs: arrays; Placed or Parts may stand for them. shapes: of the inputs, in the model's
    order. wanted: the results on the host. receive: given those, which are valid until it returns;
    None: they are arrays of their own. placements: of its members with tensors on the device.
    """

    inputs: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    profile: int
    wanted: Sequence[str]
    into: Mapping[str, Array]
    receive: Callable[[Mapping[str, Array]], None] | None = None
    placements: Sequence[Placement] = ()

    @property
    def alone(self) -> Placement | None:
        """Of a request that runs alone, in place."""
        return next((each for each in self.placements if each.is_in_place), None)

    @property
    def is_awaited(self) -> bool:
        """Whether somebody wants more than that the device has the run."""
        return bool(self.wanted) or any(each.is_awaited for each in self.placements)

    def bound_inputs(self, specs: Sequence[TensorSpec]) -> dict[str, Placed]:
        """Those that are read where they are: of a request alone.

        Integers may be indices, and a client can write its memory at any time: what is read twice
        must be the same twice. So they are copied on the device; booleans are too.
        """
        if self.alone is None:
            return {}
        return {
            spec.name: self.inputs[spec.name]
            for spec in specs
            if spec.dtype.name.startswith(("FP", "BF"))
            and not isinstance(self.inputs[spec.name], np.ndarray)
        }

    def check_results(self, outputs: Mapping[str, Shape]) -> None:
        """Raises EngineError when a result has another shape than the array that it is to go to."""
        for name, target in self.into.items():
            if name in self.wanted and target.shape != outputs[name]:
                raise EngineError(
                    f"output '{name}' has the shape {list(outputs[name])}, "
                    f"the array to write it to has {list(target.shape)}"
                )

    def target(self, output: TensorSpec, shape: Shape) -> Array:
        """The array for a result: the caller's, or a new one."""
        given = self.into.get(output.name)
        return given if given is not None else np.empty(shape, output.dtype.numpy)


def check_request(
    spec: EngineSpec,
    inputs: Mapping[str, Any],
    wanted: Sequence[str],
    into: Mapping[str, Array],
) -> dict[str, Shape]:
    """The inputs' shapes, in the model's order. Raises EngineError when anything does not fit."""
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    if unknown := inputs.keys() - {tensor.name for tensor in spec.inputs}:
        raise EngineError(f"the model has no input '{min(unknown)}'")
    for name in (*wanted, *into):
        if name not in outputs:
            raise EngineError(f"the model has no output '{name}'")
    for name, array in into.items():
        _check_target(outputs[name], array)
    return {tensor.name: _checked_shape(tensor, inputs) for tensor in spec.inputs}


def _checked_shape(tensor: TensorSpec, inputs: Mapping[str, Any]) -> Shape:
    array = inputs.get(tensor.name)
    if array is None:
        raise EngineError(f"input '{tensor.name}' is missing")
    if array.dtype != tensor.dtype.numpy:
        raise EngineError(
            f"input '{tensor.name}' has the type {array.dtype}, expected {tensor.dtype.name}"
        )
    assert array.flags.c_contiguous
    fits = len(array.shape) == len(tensor.shape) and all(
        known in (-1, dim) for known, dim in zip(tensor.shape, array.shape, strict=True)
    )
    if not fits:
        raise EngineError(
            f"input '{tensor.name}' has the shape {list(array.shape)}, "
            f"expected {list(tensor.shape)}"
        )
    shape: Shape = array.shape
    return shape


def _check_target(output: TensorSpec, array: Array) -> None:
    if array.dtype != output.dtype.numpy or not array.flags.carray:
        raise EngineError(
            f"output '{output.name}' needs a writable, contiguous array of {output.dtype.name}, "
            f"got {array.dtype}"
        )
