# SPDX-License-Identifier: Apache-2.0
"""A run whose tensors are on the device already, or stay there. Pure but for its callbacks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.cuda.device import Stream
from thirdrail_engines.cuda.request import Request
from thirdrail_engines.plans import Shape


class Placed(Protocol):
    """A tensor on the device, row-major. Whoever passes it orders the run after its writing."""

    @property
    def address(self) -> int: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Placement:
    """on_device: the outputs that stay there.

    place: given their bytes by name, once, returns their addresses. It may raise.
    given: told the stream that the run was given to, when nothing more follows.
    """

    on_device: Sequence[str]
    place: Callable[[Mapping[str, int]], Mapping[str, int]]
    given: Callable[[Stream], None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """A run's inputs by where they are. staged: into the slot's own memory, in the model's order.

    Integers may be indices, and a client can write its memory at any time: what is read twice must
    be the same twice. So they are copied on the device; booleans are too.
    """

    host: tuple[TensorSpec, ...]
    copied: Mapping[str, Placed]
    bound: Mapping[str, Placed]

    @classmethod
    def of(cls, specs: tuple[TensorSpec, ...], inputs: Mapping[str, Array | Placed]) -> "Inputs":
        host, copied, bound = [], {}, {}
        for spec in specs:
            tensor = inputs[spec.name]
            if isinstance(tensor, np.ndarray):
                host.append(spec)
            elif spec.dtype.name.startswith(("FP", "BF")):
                bound[spec.name] = tensor
            else:
                copied[spec.name] = tensor
        return cls(tuple(host), copied, bound)

    def staged(self, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in specs if spec.name not in self.bound)


def sizes_of(
    outputs: tuple[TensorSpec, ...], shapes: Mapping[str, Shape], names: Sequence[str]
) -> dict[str, int]:
    """In bytes, by name."""
    return {
        spec.name: int(np.prod(shapes[spec.name])) * spec.dtype.itemsize
        for spec in outputs
        if spec.name in names
    }


def of_host(request: Request, host: tuple[TensorSpec, ...], on_device: Sequence[str]) -> Request:
    """The part of a request that goes by way of the host."""
    return Request(
        {spec.name: request.inputs[spec.name] for spec in host},
        request.shapes,
        request.profile,
        [name for name in request.wanted if name not in on_device],
        {},
    )
