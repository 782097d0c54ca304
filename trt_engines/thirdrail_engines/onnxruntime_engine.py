# SPDX-License-Identifier: Apache-2.0
"""The engine on ONNX Runtime's CPU kernels: the embedded default, and the reference for all others.

Two ways into a session, chosen by measurement. Its plain `run` takes numeric arrays where they lie
and hands out results where it made them: no copy on either side, and 4-5 us in all for 64 bytes.
An I/O binding costs 8-11 us, and is the only way to have a result written where the caller wants
it, or to pass BF16, for which the plain call knows no numpy type. Strings are the reverse: only
the plain call takes them, as `str`.
"""

import ctypes
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from thirdrail import dtypes
from thirdrail.dtypes import BYTES, DType
from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.engine import EngineError, EngineSpec, ModelFileError
from thirdrail_engines.inspector import Findings, Inspector
from thirdrail_engines.onnxruntime_errors import tidy
from thirdrail_engines.options import EngineOptions

_log = logging.getLogger(__name__)

_PLATFORM = "onnxruntime_onnx"
_BF16 = dtypes.BY_NAME["BF16"]
_LOG_NOTHING = 4  # errors come as exceptions; on standard error they would be noise

# How ONNX Runtime writes the element types that we serve, and their numbers in ONNX.
_TYPES: dict[str, tuple[str, int]] = {
    "tensor(bool)": ("BOOL", 9),
    "tensor(uint8)": ("UINT8", 2),
    "tensor(uint16)": ("UINT16", 4),
    "tensor(uint32)": ("UINT32", 12),
    "tensor(uint64)": ("UINT64", 13),
    "tensor(int8)": ("INT8", 3),
    "tensor(int16)": ("INT16", 5),
    "tensor(int32)": ("INT32", 6),
    "tensor(int64)": ("INT64", 7),
    "tensor(float16)": ("FP16", 10),
    "tensor(bfloat16)": ("BF16", 16),
    "tensor(float)": ("FP32", 1),
    "tensor(double)": ("FP64", 11),
    "tensor(string)": ("BYTES", 8),
}
_ELEMENT_TYPES: dict[str, int] = dict(_TYPES.values())


def load_onnx(path: Path, *, options: EngineOptions, inspector: Inspector) -> "OnnxRuntimeEngine":
    """Load an ONNX file, with the weights that it keeps in files beside it.

    Raises ModelFileError when the file cannot be read or served.
    """
    _check_file(path)
    future = inspector.begin(path)
    try:
        session = ort.InferenceSession(
            str(path), _session_options(options), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its own classes share no parent but Exception
        raise ModelFileError(f"{path.name}: {_load_failure(path, error)}") from None
    findings = future.result()
    if findings.error:
        _log.warning("%s: every input will be copied: %s", path, findings.error)
    spec = _spec_of(path, session, findings)
    _return_free_memory()
    return OnnxRuntimeEngine(session, spec)


class OnnxRuntimeEngine:
    """See Engine. Build it with `load_onnx`."""

    def __init__(self, session: Any, spec: EngineSpec) -> None:
        self._session: Any = session
        self._spec = spec
        self._texts = frozenset(t.name for t in (*spec.inputs, *spec.outputs) if t.dtype is BYTES)
        self._takes_text = any(tensor.dtype is BYTES for tensor in spec.inputs)
        self._has_bf16 = any(tensor.dtype is _BF16 for tensor in (*spec.inputs, *spec.outputs))
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
        for name, array in into.items():
            self._check_target(name, array)
        if self._takes_text or not (into or self._has_bf16):
            return self._run_plain(inputs, wanted, into)
        return self._run_bound(inputs, wanted, into)

    def close(self) -> None:
        """See Engine.close. Results that were handed out stay valid."""
        self._session = None
        _return_free_memory()

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
        self, inputs: Mapping[str, Array], wanted: Sequence[str], into: Mapping[str, Array]
    ) -> dict[str, Array]:
        feed = {
            name: _to_text(name, array) if name in self._texts else array
            for name, array in inputs.items()
        }
        try:
            results = self._session.run(wanted, feed)
        except Exception as error:
            raise EngineError(tidy(str(error))) from None
        answer = {}
        for name, result in zip(wanted, results, strict=True):
            if name in self._texts:
                answer[name] = _to_bytes(result)
            elif name in into:
                answer[name] = _copy_into(name, result, into[name])
            else:
                answer[name] = result
        return answer

    def _run_bound(
        self, inputs: Mapping[str, Array], wanted: Sequence[str], into: Mapping[str, Array]
    ) -> dict[str, Array]:
        binding = self._session.io_binding()
        in_place = into.keys() - self._passed_on
        try:
            for name, array in inputs.items():
                binding.bind_input(name, *_place(array))
            for name in wanted:
                if name in in_place:
                    binding.bind_output(name, *_place(into[name]))
                else:
                    binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            if len(in_place) == len(wanted):
                return {name: into[name] for name in wanted}
            values = binding.get_outputs()
        except Exception as error:
            raise EngineError(tidy(str(error))) from None
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
        if target is not None:
            return _copy_into(name, array, target)
        return array.copy() if name in self._passed_on else array


def _place(array: Array) -> tuple[str, int, int, tuple[int, ...], int]:
    """An array as I/O binding names it. The numbers are plain: the array must outlive the run."""
    assert array.flags.c_contiguous
    element_type = _ELEMENT_TYPES[dtypes.dtype_of_array(array).name]
    return "cpu", 0, element_type, array.shape, array.ctypes.data


def _copy_into(name: str, result: Array, target: Array) -> Array:
    if result.shape != target.shape:
        raise EngineError(
            f"output '{name}' has the shape {list(result.shape)}, "
            f"the array to write it to has {list(target.shape)}"
        )
    np.copyto(target, result)
    return target


def _to_text(name: str, array: Array) -> Array:
    try:
        return dtypes.object_array([element.decode() for element in array.flat], array.shape)
    except UnicodeDecodeError:
        raise EngineError(
            f"input '{name}' has an element that is not UTF-8, and this model takes text"
        ) from None


def _to_bytes(array: Array) -> Array:
    return dtypes.object_array([element.encode() for element in array.flat], array.shape)


def _bf16_of(value: Any) -> Array:
    """A copy of a BF16 result: ONNX Runtime gives numpy no view of it, but its address."""
    assert _BF16.numpy is not None
    size = value.tensor_size_in_bytes()
    data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(data, dtype=_BF16.numpy).reshape(value.shape())


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ModelFileError(f"{path.name}: no such file")
    if path.stat().st_size == 0:
        raise ModelFileError(f"{path.name}: the file is empty")


def _session_options(options: EngineOptions) -> Any:
    session_options = ort.SessionOptions()
    session_options.log_severity_level = _LOG_NOTHING
    session_options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    session_options.intra_op_num_threads = options.threads_max
    session_options.inter_op_num_threads = 1
    # Spinning wins microseconds for one model alone and takes a whole core from everything else on
    # the host.
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session_options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Its arena keeps the peak of every session for ever. malloc is as fast here and gives back:
    # five small models after their first runs take 111 MB with it and 136 MB with the arena.
    session_options.enable_cpu_mem_arena = False
    return session_options


def _load_failure(path: Path, error: Exception) -> str:
    text = tidy(str(error), path.parent)
    if type(error).__name__ == "InvalidProtobuf":
        return "not a readable ONNX file, perhaps cut short or damaged"
    if "External data path does not exist" in text:
        return f"weights are missing: {text}"
    return text or "ONNX Runtime refused it without a reason"


def _spec_of(path: Path, session: Any, findings: Findings) -> EngineSpec:
    inputs = [_tensor(path, "input", node) for node in session.get_inputs()]
    inputs += [
        _tensor(path, "input", node, optional=True)
        for node in session.get_overridable_initializers()
    ]
    outputs = [_tensor(path, "output", node) for node in session.get_outputs()]
    _check_mixture(path, inputs, outputs)
    # ONNX Runtime says () for a scalar and for an unknown rank, and may have inferred what the
    # file lacks.
    unranked = frozenset(
        tensor.name
        for tensor in (*inputs, *outputs)
        if tensor.shape == () and tensor.name in findings.unranked
    )
    names = {tensor.name for tensor in inputs if not tensor.optional}
    return EngineSpec(
        tuple(inputs), tuple(outputs), _PLATFORM, findings.positional_inputs & names, unranked
    )


def _tensor(path: Path, kind: str, node: Any, *, optional: bool = False) -> TensorSpec:
    dtype = _served_dtype(node.type)
    if dtype is None:
        raise ModelFileError(
            f"{path.name}: {kind} '{node.name}' is a {node.type}, "
            f"expected a tensor of one of {', '.join(_ELEMENT_TYPES)}"
        )
    if dtype.numpy is None:
        raise ModelFileError(f"{path.name}: {kind} '{node.name}' is BF16: install ml_dtypes")
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
    return TensorSpec(node.name, dtype, shape, optional)


def _served_dtype(type_name: str) -> DType | None:
    row = _TYPES.get(type_name)
    return dtypes.BY_NAME[row[0]] if row else None


def _check_mixture(path: Path, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
    kinds = {tensor.dtype.name for tensor in inputs}
    if "BYTES" in kinds and "BF16" in kinds | {tensor.dtype.name for tensor in outputs}:
        raise ModelFileError(
            f"{path.name}: BYTES inputs beside BF16 tensors are more than ONNX Runtime's "
            "Python interface can pass"
        )


def _return_free_memory() -> None:
    """Make glibc's malloc give back the free pages that it would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
