# SPDX-License-Identifier: Apache-2.0
"""An input whose rows lie in several places, each request's of a batch in its own. Pure code."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from thirdrail.tensors import Array
from thirdrail_engines.cuda.placed import Placed
from thirdrail_engines.engine import EngineError
from thirdrail_engines.plans import Shape


@dataclass(frozen=True, slots=True)
class Parts:
    """To whoever checks it, one array. Each part is on the host or on the device."""

    parts: Sequence[Any]  # Array or Placed with a dtype
    dtype: "np.dtype[Any]"
    shape: Shape

    flags: ClassVar = SimpleNamespace(c_contiguous=True)  # as it will be on the device

    @classmethod
    def of(cls, name: str, parts: Sequence[Any]) -> "Parts":
        """One after the other, along the first dimension. Raises EngineError where they do not fit
        together."""
        first = parts[0]
        for part in parts:
            if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype or not part.shape:
                raise EngineError(
                    f"the requests of a batch have '{name}' as {first.dtype} {list(first.shape)} "
                    f"and {part.dtype} {list(part.shape)}"
                )
        rows = sum(part.shape[0] for part in parts)
        return cls(parts, first.dtype, (rows, *first.shape[1:]))


def joined(name: str, parts: Sequence[Any]) -> Any:
    """What the parts are together; of one part itself. Raises EngineError."""
    return parts[0] if len(parts) == 1 else Parts.of(name, parts)


def parts_of(tensor: "Array | Placed | Parts") -> Iterator[tuple[int, Any]]:
    """What a tensor consists of, each with where it begins, in bytes."""
    offset = 0
    for part in tensor.parts if isinstance(tensor, Parts) else (tensor,):
        yield offset, part
        offset += part.nbytes
