# SPDX-License-Identifier: Apache-2.0
"""The engine on ONNX Runtime's CPU kernels: the embedded default, and the reference for all others.

Two ways into a session, chosen by measurement. Its plain `run` takes numeric arrays where they lie
and hands out results where it made them: no copy on either side, and 5 us in all for 64 bytes. An
I/O binding costs 13 us, and is the only way to have a result written where the caller wants it, or
to pass BF16, for which the plain call knows no numpy type. So it is used for BF16 and for results
whose copy would take longer than the difference. Strings only the plain call takes, as `str`.
"""

import ctypes
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thirdrail import dtypes
from thirdrail.dtypes import BYTES
from thirdrail.tensors import Array
from thirdrail_engines.engine import EngineError, EngineInputError, EngineSpec
from thirdrail_engines.inspector import Inspector
from thirdrail_engines.malloc import return_free_memory
from thirdrail_engines.onnxruntime_errors import run_failure
from thirdrail_engines.onnxruntime_plan import read_plan
from thirdrail_engines.onnxruntime_session import (
    CPU_PROVIDERS,
    ELEMENT_TYPES,
    open_plan,
    open_session,
    spec_of,
)
from thirdrail_engines.options import EngineOptions

_log = logging.getLogger(__name__)

_BF16 = dtypes.BY_NAME["BF16"]
_WRITTEN_IN_PLACE_BYTES_MIN = 128 << 10  # copied in 4 us, which is less than a binding costs


def load_onnx(
    path: Path,
    *,
    options: EngineOptions,
    inspector: Inspector,
    providers: Sequence[str] = CPU_PROVIDERS,
) -> "OnnxRuntimeEngine":
    """Load an ONNX file, with the weights that it keeps in files beside it.

    Raises ModelFileError when the file cannot be read or served.
    """
    future = inspector.begin(path)
    session = open_session(path, options, providers)
    findings = future.result()
    if findings.error:
        _log.warning("%s: every input will be copied: %s", path, findings.error)
    spec = spec_of(path, session, findings)
    return_free_memory()
    return OnnxRuntimeEngine(session, spec)


def load_plan(
    data: bytes | memoryview, source: Path, *, options: EngineOptions
) -> "OnnxRuntimeEngine":
    """Load a plan of ONNX Runtime's builder: the same engine as `load_onnx` makes of its source.

    data: the plan. It is of no use afterwards. source: names the model in errors.
    Raises ModelFileError when it is no such plan, or this ONNX Runtime cannot run it.
    """
    plan = read_plan(source.name, data)
    session = open_plan(source, plan, options)
    spec = spec_of(source, session, plan.findings)
    return_free_memory()
    return OnnxRuntimeEngine(session, spec)


class OnnxRuntimeEngine:
    """See Engine. Build it with `load_onnx`."""

    def __init__(self, session: Any, spec: EngineSpec) -> None:
        self._session: Any = session
        self._spec = spec
        self._takes_text = any(tensor.dtype is BYTES for tensor in spec.inputs)
        self._prepare = {
            t.name: _PREPARE[t.dtype.name] for t in spec.inputs if t.dtype.name in _PREPARE
        }
        self._has_bf16 = any(tensor.dtype is _BF16 for tensor in (*spec.inputs, *spec.outputs))
        self._text_outputs = frozenset(t.name for t in spec.outputs if t.dtype is BYTES)
        self._outputs = {tensor.name: tensor for tensor in spec.outputs}
        # A result that is an input itself: a binding would answer with the caller's memory, or not
        # at all.
        self._passed_on = frozenset(t.name for t in spec.inputs) & frozenset(self._outputs)

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    def run(
        self,
        inputs: Mapping[str, Array],
        wanted: Sequence[str],
        into: Mapping[str, Array],
    ) -> dict[str, Array]:
        """See Engine.run. BYTES elements must be UTF-8: ONNX Runtime knows text only."""
        if not wanted:  # to ONNX Runtime, none means all
            return {}
        if self._prepare:
            inputs = {name: self._prepared(name, array) for name, array in inputs.items()}
        into_bytes = 0
        for name, array in into.items():
            self._check_target(name, array)
            into_bytes += array.nbytes
        is_small = into_bytes < _WRITTEN_IN_PLACE_BYTES_MIN
        if self._takes_text or (is_small and not self._has_bf16):
            return self._run_plain(inputs, wanted, into)
        return self._run_bound(inputs, wanted, into)

    def close(self) -> None:
        """See Engine.close. Results that were handed out stay valid."""
        self._session = None
        return_free_memory()

    def _prepared(self, name: str, array: Array) -> Array:
        prepare = self._prepare.get(name)
        return array if prepare is None else prepare(name, array)

    def _check_target(self, name: str, array: Array) -> None:
        output = self._outputs.get(name)
        if output is None or output.dtype is BYTES:
            raise EngineError(f"'{name}' is not an output that can be written in place")
        if array.dtype != output.dtype.numpy or not array.flags.carray:
            raise EngineError(
                f"output '{name}' needs a writable, contiguous array of {output.dtype.name}, "
                f"got {array.dtype}"
            )

    def _run_plain(
        self, feed: Mapping[str, Array], wanted: Sequence[str], into: Mapping[str, Array]
    ) -> dict[str, Array]:
        try:
            results = self._session.run(wanted, feed)
        except Exception as error:
            raise run_failure(error, feed) from None
        answer = dict(zip(wanted, results, strict=True))
        for name, target in into.items():
            _check_shape(name, answer[name], target)
        for name in self._text_outputs.intersection(wanted) if self._text_outputs else ():
            answer[name] = _to_bytes(answer[name])
        return answer

    def _run_bound(
        self, feed: Mapping[str, Array], wanted: Sequence[str], into: Mapping[str, Array]
    ) -> dict[str, Array]:
        binding = self._session.io_binding()
        in_place = into.keys() - self._passed_on
        try:
            for name, array in feed.items():
                binding.bind_input(name, *_place(array))
            for name in wanted:
                if name in in_place:
                    binding.bind_output(name, *_place(into[name]))
                else:
                    binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            if in_place.issuperset(wanted):
                return {name: into[name] for name in wanted}
            values = binding.get_outputs()
        except Exception as error:
            raise run_failure(error, feed) from None
        return {
            name: into[name] if name in in_place else self._fetch(name, value, into.get(name))
            for name, value in zip(wanted, values, strict=True)
        }

    def _fetch(self, name: str, value: Any, target: Array | None) -> Array:
        """A result that ONNX Runtime allocated, or that is an input passed on."""
        dtype = self._outputs[name].dtype
        if dtype is BYTES:
            return _to_bytes(value.numpy())
        array = _bf16_of(value) if dtype is _BF16 else value.numpy()
        _check_shape(name, array, target)
        return array.copy() if name in self._passed_on else array


def _place(array: Array) -> tuple[str, int, int, tuple[int, ...], int]:
    """An array as I/O binding names it. The numbers are plain: the array must outlive the run."""
    assert array.flags.c_contiguous
    address: int = array.__array_interface__["data"][0]  # a third of the time of array.ctypes
    return "cpu", 0, ELEMENT_TYPES[dtypes.dtype_of_array(array).name], array.shape, address


def _check_shape(name: str, result: Array, target: Array | None) -> None:
    """A result that was not written to its target could at least have been."""
    if target is not None and result.shape != target.shape:
        raise EngineError(
            f"output '{name}' has the shape {list(result.shape)}, "
            f"the array to write it to has {list(target.shape)}"
        )


def _to_text(name: str, array: Array) -> Array:
    try:
        return dtypes.object_array([element.decode() for element in array.flat], array.shape)
    except UnicodeDecodeError:
        raise EngineInputError(
            f"input '{name}' has an element that is not UTF-8, and this model takes text"
        ) from None


def _to_zero_or_one(_name: str, array: Array) -> Array:
    """Booleans that are surely 0 or 1, in memory that only we have.

    Compress counts with the bytes and copies by their truth: for a byte of 255 it answers with 254
    elements too many, out of memory that it never wrote.
    """
    return np.asarray(array.view(np.uint8) != 0)


_PREPARE = {"BYTES": _to_text, "BOOL": _to_zero_or_one}


def _to_bytes(array: Array) -> Array:
    return dtypes.object_array([element.encode() for element in array.flat], array.shape)


def _bf16_of(value: Any) -> Array:
    """A BF16 result where it lies: ONNX Runtime gives numpy no view of it, but its address."""
    assert _BF16.numpy is not None
    memory = (ctypes.c_ubyte * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    memory.owner = value  # it lives as long as the memory is looked at
    return np.frombuffer(memory, dtype=_BF16.numpy).reshape(value.shape())
