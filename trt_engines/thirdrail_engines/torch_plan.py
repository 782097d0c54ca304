# SPDX-License-Identifier: Apache-2.0
"""A plan of AOTInductor: a package of native code, and what it takes and returns.

Compiled code checks nothing: with other shapes than it was compiled for, it reads and writes beyond
its tensors. So the header says exactly which sizes it takes, and no run begins with others.

The file (plan_files.py) has one part, the package: a zip archive, which torch.export calls a `.pt2`
as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thirdrail import dtypes
from thirdrail.tensors import TensorSpec
from thirdrail_engines.engine import EngineInputError, ModelFileError
from thirdrail_engines.plan_files import checking_header, read_plan_file, write_plan_file

_KIND = b"thirdrail aot_inductor plan 1\n"

Size = int | str  # a number, or the name of an open one; those of one name are equal


@dataclass(frozen=True, slots=True)
class Sizes:
    """inputs: by name, the size of each dimension. bounds: by name of a size, the least and the
    most, both allowed; None: no end."""

    inputs: Mapping[str, tuple[Size, ...]]
    bounds: Mapping[str, tuple[int, int | None]]

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises EngineInputError for shapes that the compiled code does not take."""
        known: dict[str, tuple[int, str]] = {}
        for name, wanted in self.inputs.items():
            found = shapes[name]
            if len(found) != len(wanted):
                raise EngineInputError(
                    f"input '{name}' has {len(found)} dimensions, not {len(wanted)}"
                )
            for axis, (size, allowed) in enumerate(zip(found, wanted, strict=True)):
                self._check_size(f"dimension {axis} of input '{name}'", size, allowed, known)

    def _check_size(
        self, place: str, size: int, allowed: Size, known: dict[str, tuple[int, str]]
    ) -> None:
        if isinstance(allowed, int):
            if size != allowed:
                raise EngineInputError(f"{place} is {size}, the model takes {allowed}")
            return
        least, most = self.bounds[allowed]
        if size < least or (most is not None and size > most):
            limit = f"{least} or more" if most is None else f"{least} to {most}"
            raise EngineInputError(f"{place} is {size}, the model takes {limit}")
        other_size, other = known.setdefault(allowed, (size, place))
        if size != other_size:
            raise EngineInputError(
                f"{place} is {size}, and {other} is {other_size}: they must be equal"
            )


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """outputs: in the order in which the package returns them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: Sizes
    package: memoryview


def write_plan(
    path: Path, package: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec],
    sizes: Sizes,
) -> None:  # fmt: skip
    header = {
        "inputs": [[spec.name, spec.dtype.name, sizes.inputs[spec.name]] for spec in inputs],
        "outputs": [[spec.name, spec.dtype.name, spec.shape] for spec in outputs],
        "bounds": dict(sizes.bounds),
        "package_bytes": package.stat().st_size,
    }
    write_plan_file(path, _KIND, header, [package])


def read_plan(name: str, data: bytes | memoryview) -> TorchPlan:
    """The package is a view of `data`. Raises ModelFileError when that is no whole plan."""
    header, package = read_plan_file(name, data, _KIND, "AOTInductor's builder")
    with checking_header(name):
        plan = _plan(header, package)
        package_bytes = int(header["package_bytes"])
    if package.nbytes != package_bytes:
        raise ModelFileError(
            f"{name}: the package in its plan has {package.nbytes} bytes, expected {package_bytes}"
        )
    return plan


def _plan(header: Mapping[str, Any], package: memoryview) -> TorchPlan:
    bounds = {
        str(name): (int(least), None if most is None else int(most))
        for name, (least, most) in header["bounds"].items()
    }
    sizes = {
        str(name): tuple(_size(size, bounds) for size in row) for name, _, row in header["inputs"]
    }
    inputs = tuple(
        TensorSpec(name, dtypes.BY_NAME[dtype], tuple(-1 if isinstance(s, str) else s for s in row))
        for (name, row), (_, dtype, _) in zip(sizes.items(), header["inputs"], strict=True)
    )
    outputs = tuple(
        TensorSpec(str(name), dtypes.BY_NAME[dtype], tuple(map(int, shape)))
        for name, dtype, shape in header["outputs"]
    )
    return TorchPlan(inputs, outputs, Sizes(sizes, bounds), package)


def _size(value: object, bounds: Mapping[str, object]) -> Size:
    if isinstance(value, str) and value in bounds:
        return value
    if type(value) is int and value >= 0:
        return value
    raise ValueError
