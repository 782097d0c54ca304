# SPDX-License-Identifier: Apache-2.0
"""Which sizes a program of torch.export takes, in terms that are checked without PyTorch.

Imports torch. A program that asks for more than sizes within bounds and equal to each other is
refused: it has to be run by PyTorch itself, which evaluates the program's own guards.
"""

import re
from pathlib import Path
from typing import Any

import torch

from thirdrail_engines.torch_plan import Size, Sizes
from thirdrail_engines.torch_sources.exported import Exported
from thirdrail_engines.torch_sources.reading import refusal

# What equal names and bounds say already: a size against another, or against a number.
_SIZE = r"L(\[[^\]]+\])+\.size\(\)\[\d+\]"
_SIMPLE_GUARD = re.compile(rf"{_SIZE} == ({_SIZE}|\d+)|{_SIZE} (<=|>=|<|>) \d+|\d+ (<=|<) {_SIZE}")

# The range of a dimension of which its author said no more than that it is open.
_UNSAID = (2, None)


def sizes_of(path: Path, exported: Exported) -> Sizes:
    """Raises BuildError REFUSED."""
    program = exported.program
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs: dict[str, tuple[Size, ...]] = {}
    for spec in exported.inputs:
        value = values[spec.name]
        if not value.is_contiguous():
            raise refusal(
                path,
                f"input '{spec.name}' was exported with elements in another order than that of "
                "rows: export it with examples that are contiguous",
            )
        inputs[spec.name] = tuple(_size(path, spec.name, dim) for dim in value.shape)
    for guard in getattr(program, "_guards_code", None) or ():
        if not _SIMPLE_GUARD.fullmatch(guard.strip()):
            raise refusal(path, f"compiled code could not hold to what it demands: {guard}")
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    for name, row in inputs.items():
        if row and isinstance(row[0], str) and _bounds(ranges.get(row[0])) == _UNSAID:
            raise refusal(
                path,
                f"input '{name}' was exported for two rows and more, as Dim.AUTO and Dim.DYNAMIC "
                "are, and compiled code would take no single row: export it with "
                "torch.export.Dim('rows', min=1, max=...)",
            )
    names = {size for row in inputs.values() for size in row if isinstance(size, str)}
    return Sizes(inputs, {name: _bounds(ranges.get(name)) for name in sorted(names)})


def _size(path: Path, name: str, dim: Any) -> Size:
    if isinstance(dim, int):
        return dim
    expression = dim.node.expr
    if not expression.is_symbol:
        raise refusal(
            path,
            f"a size of input '{name}' follows from another by a formula ({expression}), which "
            "compiled code does not check",
        )
    return str(expression)


def _bounds(found: Any) -> tuple[int, int | None]:
    """found: of a size, as the program has it; without one, a size is anything."""
    if found is None:
        return 0, None
    least, most = found.lower, found.upper
    endless = torch.utils._sympy.numbers.int_oo
    return max(0, int(least)), None if most == endless else int(most)
