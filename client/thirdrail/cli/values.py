# SPDX-License-Identifier: Apache-2.0
"""Tensors as people type and read them: `--input` -> arrays, results -> text, JSON and files."""

import base64
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thirdrail import dtypes
from thirdrail.arrays import array_of_value
from thirdrail.dtypes import BOOL, BYTES
from thirdrail.errors import InvalidArgument
from thirdrail.tensors import Array, TensorSpec

_WORDS = {"true": True, "false": False}


def array_of_text(text: str, spec: TensorSpec) -> Array:
    """What stands behind `name=`: @file, a JSON list, numbers with commas, or one text.

    Raises InvalidArgument for what is none of them or does not fit the declared type and shape.
    """
    if text.startswith("@"):
        return _array_of_file(text[1:], spec)
    if text.startswith("["):
        return array_of_value(spec.name, _json(text, spec), spec)
    if spec.dtype is BYTES:
        return array_of_value(spec.name, text, spec)
    numbers = [_number(word.strip(), spec) for word in text.split(",")]
    return _shaped(array_of_value(spec.name, numbers, spec), spec)


def fitting_shape(spec: TensorSpec, count: int) -> tuple[int, ...]:
    """The declared shape with its open sizes chosen for `count` elements: 1, the last one the rest.

    Raises InvalidArgument when they cannot fit.
    """
    fixed = math.prod(size for size in spec.shape if size >= 0)
    open_sizes = [at for at, size in enumerate(spec.shape) if size < 0]
    shape = [max(size, 1) if at in open_sizes else size for at, size in enumerate(spec.shape)]
    if open_sizes and fixed:
        shape[open_sizes[-1]] = count // fixed
    if math.prod(shape) != count:
        raise InvalidArgument(
            f"input '{spec.name}' has the shape {list(spec.shape)}, {count} elements do not fit"
        )
    return tuple(shape)


def _array_of_file(name: str, spec: TensorSpec) -> Array:
    if name.endswith(".npz"):
        raise InvalidArgument(f"input '{spec.name}': {name} holds several arrays, expected .npy")
    try:
        if name.endswith(".npy"):
            return _array_of_npy(name, spec)
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InvalidArgument(
            f"input '{spec.name}': cannot read {name}: {error.strerror}"
        ) from None
    if name.endswith(".json"):
        return array_of_value(spec.name, _json(data, spec), spec)
    if spec.dtype is BYTES:
        return array_of_value(spec.name, data, spec)
    if spec.dtype.numpy is None or len(data) % spec.dtype.itemsize:
        raise InvalidArgument(
            f"input '{spec.name}': {name} has {len(data)} bytes, no whole number of "
            f"{spec.dtype.name} elements"
        )
    return _shaped(np.frombuffer(data, dtype=spec.dtype.numpy), spec)


def _array_of_npy(name: str, spec: TensorSpec) -> Array:
    """What numpy says of other files advises to unpickle them, so it is not repeated."""
    with Path(name).open("rb") as file:
        try:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
        except ValueError:
            raise InvalidArgument(
                f"input '{spec.name}': {name} is damaged, or no file of numpy.save with numbers"
            ) from None


def _shaped(array: Array, spec: TensorSpec) -> Array:
    return array.reshape(fitting_shape(spec, array.size))


def _json(text: str | bytes, spec: TensorSpec) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"input '{spec.name}' is not JSON: {error}") from None


def _number(word: str, spec: TensorSpec) -> bool | int | float:
    if spec.dtype is BOOL and word.lower() in ("0", "1"):
        return word == "1"
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    try:
        return int(word, 0)
    except ValueError:
        pass
    try:
        return float(word)
    except ValueError:
        raise InvalidArgument(
            f"input '{spec.name}' is {spec.dtype.name}, got '{word}'. Expected numbers with "
            "commas, a JSON list, or @file"
        ) from None


# -- results -----------------------------------------------------------------------------------


def json_of_array(array: Array) -> dict[str, Any]:
    """A tensor for JSON: nested lists; what JSON has no number for becomes "NaN" or "Infinity"."""
    dtype = dtypes.dtype_of_array(array)
    if dtype is BYTES:
        data = _map_nested(array.tolist(), _json_of_bytes)
    elif array.dtype.kind in "biu":
        data = array.tolist()
    else:
        data = _map_nested(array.astype(np.float64).tolist(), _json_of_float)
    return {"datatype": dtype.name, "shape": list(array.shape), "data": data}


def text_of_array(array: Array) -> str:
    """A tensor on a few lines, its middle left out when it is large."""
    if dtypes.dtype_of_array(array) is BYTES:
        shown = [_text_of_bytes(element) for element in array.ravel()[:20].tolist()]
        return "\n".join(shown) + ("\n…" if array.size > len(shown) else "")
    return np.array2string(array, threshold=40, edgeitems=3, precision=6)


def save(path: Path, outputs: dict[str, Array]) -> None:
    """Writes .npy for one output, .npz for any number, or one BYTES element as the file itself.

    Raises InvalidArgument when the outputs do not fit the kind of file, or it cannot be written.
    """
    try:
        _save(path, outputs)
    except OSError as error:
        raise InvalidArgument(f"cannot write {path}: {error.strerror}") from None


def _save(path: Path, outputs: dict[str, Array]) -> None:
    if path.suffix == ".npz":
        named: dict[str, Any] = {name: _savable(name, array) for name, array in outputs.items()}
        np.savez(path, **named)
        return
    if len(outputs) != 1:
        raise InvalidArgument(
            f"{path} holds one output and there are {', '.join(outputs)}: choose one with "
            "--output, or save to a .npz file"
        )
    [(name, array)] = outputs.items()
    if path.suffix == ".npy":
        np.save(path, _savable(name, array))
    elif array.dtype == np.object_ and array.size == 1:
        path.write_bytes(array.item())
    else:
        raise InvalidArgument(f"expected a .npy or .npz file for output '{name}', got {path}")


def _savable(name: str, array: Array) -> Array:
    if array.dtype == np.object_:
        raise InvalidArgument(f"output '{name}' is BYTES, which .npy files do not hold: use --json")
    return array


def _map_nested(value: Any, convert: Any) -> Any:
    if isinstance(value, list):
        return [_map_nested(item, convert) for item in value]
    return convert(value)


def _json_of_float(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _json_of_bytes(element: bytes) -> str | dict[str, str]:
    try:
        return element.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(element).decode()}


def _text_of_bytes(element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError:
        return f"{len(element)} bytes, {element[:16].hex(' ')}" + "…" * (len(element) > 16)


def named_texts(pairs: Sequence[str], option: str) -> dict[str, str]:
    """["x=1", "y=2"] -> {"x": "1", "y": "2"}. Raises InvalidArgument for a pair without a name."""
    named = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name and equals):
            raise InvalidArgument(f"{option} takes NAME=VALUE, got '{pair}'")
        if name in named:
            raise InvalidArgument(f"{option} '{name}' is given twice")
        named[name] = text
    return named
