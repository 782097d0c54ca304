# SPDX-License-Identifier: Apache-2.0
"""Expectations in a file, from the process that computed them to the one that compares.

Lines of JSON: the tensors of the reference, then one for each run, which is followed by the bytes
of its arrays, in the wire form of tensors. The process that writes has run a stranger's model, so
what is read is untrusted: it becomes tensors of types, shapes and sizes that agree, of those names
that the engine under proof knows, or NoExpectations.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from thirdrail import dtypes
from thirdrail.dtypes import Buffer
from thirdrail.errors import InvalidArgument
from thirdrail.tensors import RANK_MAX, Array, TensorSpec, array_of_bytes, bytes_of_array
from thirdrail_engines.builds.wire import presentable
from thirdrail_engines.engine import EngineSpec
from thirdrail_engines.expectations import Expectation, Skipped


class NoExpectations(Exception):
    """A file that does not hold what `write_expectations` writes. The text says what it holds."""


_LINE_BYTES_MAX = 4 << 20
_TENSORS_MAX = 10_000
_RUNS_MAX = 10_000
_TEXT_CHARS_MAX = 4000


def write_expectations(
    path: Path,
    spec: EngineSpec,
    expected: Iterable[Expectation | Skipped],
    bytes_max: int,
) -> None:
    """A run whose arrays do not fit into bytes_max any more is written as one that was skipped.

    Raises OSError when the file cannot be written.
    """
    with path.open("xb") as file:
        _write_line(file, {"inputs": _plain(spec.inputs), "outputs": _plain(spec.outputs)})
        for each in expected:
            if isinstance(each, Skipped):
                _write_skipped(file, each.reason)
            elif not _write_run(file, each, bytes_max):
                _write_skipped(file, f"{each.run}: arrays of more than {bytes_max} bytes in all")


def _write_skipped(file: BinaryIO, reason: str) -> None:
    _write_line(file, {"skipped": reason[:_TEXT_CHARS_MAX]})


def _write_run(file: BinaryIO, run: Expectation, bytes_max: int) -> bool:
    """Whether there was room for it."""
    inputs, outputs = _parts(run.inputs), _parts(run.outputs)
    size = sum(memoryview(part.data).nbytes for part in (*inputs, *outputs))
    if file.tell() + size > bytes_max:
        return False
    heads = {"inputs": [part.head for part in inputs], "outputs": [part.head for part in outputs]}
    _write_line(file, {"run": run.run, **heads})
    for part in (*inputs, *outputs):
        file.write(part.data)
    return True


@dataclass(frozen=True, slots=True)
class _Part:
    head: list[object]  # name, type, shape, bytes
    data: Buffer


def _parts(arrays: Mapping[str, Array]) -> list[_Part]:
    parts = []
    for name, array in arrays.items():
        data = bytes_of_array(array)
        dtype = dtypes.dtype_of_array(array).name
        parts.append(_Part([name, dtype, array.shape, memoryview(data).nbytes], data))
    return parts


def read_expectations(
    file: BinaryIO,
) -> tuple[EngineSpec, Iterator[Expectation | Skipped]]:
    """The inputs and outputs of the reference, and its runs, each read when it is asked for.

    Arrays are writable, and in memory of their own.
    Raises NoExpectations, as the iterator does, for a file that was not written as above.
    """
    end = os.fstat(file.fileno()).st_size
    match _read_line(file):
        case {"inputs": list() as inputs, "outputs": list() as outputs, **rest} if not rest:
            spec = EngineSpec(_tensors(inputs), _tensors(outputs), "", frozenset())
            return spec, _runs(file, end, spec)
    raise NoExpectations("a file that does not begin with the tensors of a model")


def _runs(file: BinaryIO, end: int, spec: EngineSpec) -> Iterator[Expectation | Skipped]:
    for _ in range(_RUNS_MAX):
        if file.tell() == end:
            return
        match _read_line(file):
            case {"skipped": str() as reason, **rest} if not rest:
                yield Skipped(_text(reason))
            case {
                "run": str() as name,
                "inputs": list() as inputs,
                "outputs": list() as outputs,
                **rest,
            } if not rest:
                yield Expectation(
                    _text(name),
                    _arrays(file, end, inputs, spec.inputs),
                    _arrays(file, end, outputs, spec.outputs),
                )
            case _:
                raise NoExpectations(
                    "a line that is neither a run nor the reason why there is none"
                )
    raise NoExpectations(f"more than {_RUNS_MAX} runs")


def _arrays(
    file: BinaryIO, end: int, heads: list[object], spec: Sequence[TensorSpec]
) -> dict[str, Array]:
    """One for each tensor that is not optional."""
    expected = {tensor.name: tensor for tensor in spec}
    arrays: dict[str, Array] = {}
    for head in heads:
        match head:
            case [str() as name, str() as dtype, list() as shape, int() as size]:
                if name not in expected or name in arrays or expected[name].dtype.name != dtype:
                    raise NoExpectations(f"an array {name!r} of {dtype}, which is no tensor of its")
                arrays[name] = _array(file, end, expected[name], shape, size)
            case _:
                raise NoExpectations("an array that is none")
    lacking = [t.name for t in spec if not t.optional and t.name not in arrays]
    if lacking:
        raise NoExpectations(f"a run without the tensors {lacking}")
    return arrays


def _array(file: BinaryIO, end: int, tensor: TensorSpec, shape: list[Any], size: int) -> Array:
    if not all(type(dim) is int for dim in shape):
        raise NoExpectations(f"an array '{tensor.name}' whose shape is none")
    if not 0 <= size <= end - file.tell():
        raise NoExpectations(f"an array '{tensor.name}' of {size} bytes, which are not there")
    data = np.empty(size, np.uint8)
    if file.readinto(data.data) != size:  # type: ignore[attr-defined]
        raise NoExpectations(f"an array '{tensor.name}' that ends too early")
    try:
        return array_of_bytes(tensor.name, tensor.dtype, shape, data.data)
    except InvalidArgument as error:
        raise NoExpectations(f"an array that is none: {error}") from None


def _plain(tensors: Iterable[TensorSpec]) -> list[list[object]]:
    return [[t.name, t.dtype.name, list(t.shape), t.optional] for t in tensors]


def _tensors(plain: list[object]) -> tuple[TensorSpec, ...]:
    if len(plain) > _TENSORS_MAX:
        raise NoExpectations(f"a model of {len(plain)} tensors")
    return tuple(_tensor(each) for each in plain)


def _tensor(plain: object) -> TensorSpec:
    match plain:
        case [str() as name, str() as dtype, list() as shape, bool() as optional] if (
            dtype in dtypes.BY_NAME
            and len(shape) <= RANK_MAX
            and all(type(dim) is int and dim >= -1 for dim in shape)
        ):
            return TensorSpec(name, dtypes.BY_NAME[dtype], tuple(shape), optional)
    raise NoExpectations("a tensor that is none")


def _text(text: str) -> str:
    return presentable(text, _TEXT_CHARS_MAX)


def _write_line(file: BinaryIO, message: Mapping[str, object]) -> None:
    file.write(json.dumps(message).encode() + b"\n")


def _read_line(file: BinaryIO) -> Any:
    line = file.readline(_LINE_BYTES_MAX)
    if not line.endswith(b"\n"):
        raise NoExpectations(f"a line that does not end, or is longer than {_LINE_BYTES_MAX} bytes")
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise NoExpectations("a line that is not JSON") from None
