# SPDX-License-Identifier: Apache-2.0
"""An ONNX file becomes an ONNX Runtime session, and the session the spec of an engine."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from thirdrail import dtypes
from thirdrail.dtypes import DType
from thirdrail.tensors import TensorSpec
from thirdrail_engines.engine import EngineSpec, ModelFileError
from thirdrail_engines.file_modes import is_file
from thirdrail_engines.inspector import Findings
from thirdrail_engines.onnxruntime_errors import tidy
from thirdrail_engines.onnxruntime_plan import OnnxRuntimePlan
from thirdrail_engines.options import EngineOptions

CPU_PROVIDERS = ("CPUExecutionProvider",)
# What has no kernel on the GPU runs on the CPU. Not yet run on a GPU.
CUDA_PROVIDERS = ("CUDAExecutionProvider", *CPU_PROVIDERS)

_PLATFORM = "onnxruntime_onnx"
_WEIGHT_BYTES_MIN = 1024  # smaller constants stay in a plan's graph
_PROTOBUF_BYTES_MAX = (1 << 31) - 1
_SPIN_US = 20
# The first version that was seen to know spin_duration_us (onnxruntime#27916); an older one would
# spin for as long as it likes.
_BRIEF_SPINNING_VERSION = (1, 31)
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
ELEMENT_TYPES: dict[str, int] = dict(_TYPES.values())


def open_session(
    path: Path, options: EngineOptions, providers: Sequence[str] = CPU_PROVIDERS
) -> Any:
    """An `onnxruntime.InferenceSession`. Raises ModelFileError when the file cannot be run."""
    _check_file(path)
    return _open(path, str(path), _session_options(options), providers)


def optimise(path: Path, options: EngineOptions, graph: Path, weights: Path | None) -> Any:
    """A session of an ONNX file that also writes what it made of the graph.

    graph: an ONNX file to be. weights: another in the same folder, for its large constants; None to
        have them in the graph, which then must stay below 2 GiB.
    Raises ModelFileError when the file cannot be run, or the two cannot be written.
    """
    _check_file(path)
    session_options = _session_options(options)
    session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session_options.optimized_model_filepath = str(graph)
    if weights is not None:
        entry = "session.optimized_model_external_initializers"
        session_options.add_session_config_entry(f"{entry}_file_name", weights.name)
        bytes_min = str(_WEIGHT_BYTES_MIN)
        session_options.add_session_config_entry(f"{entry}_min_size_in_bytes", bytes_min)
    return _open(path, str(path), session_options)


def open_plan(path: Path, plan: OnnxRuntimePlan, options: EngineOptions) -> Any:
    """A session of what `optimise` has written, which is run as it is. path: the source's."""
    session_options = _session_options(options)
    session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if plan.weights.nbytes:  # copied by the session, once
        session_options.add_external_initializers_from_files_in_memory(
            [plan.weights_name], [plan.weights], [plan.weights.nbytes]
        )
    return _open(path, plan.graph, session_options)


def spec_of(path: Path, session: Any, findings: Findings) -> EngineSpec:
    """What the session says about its tensors, and the graph about their use.

    Raises ModelFileError for an input or output that is no tensor of a type that we serve.
    """
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
        if tensor.shape == () and (findings.error or tensor.name in findings.unranked)
    )
    return EngineSpec(
        tuple(inputs),
        tuple(outputs),
        _PLATFORM,
        findings.positional_inputs,
        unranked,
        sized_by_shapes=findings.sized_by_shapes,
    )


def _open(
    path: Path,
    model: str | bytes,
    session_options: Any,
    providers: Sequence[str] = CPU_PROVIDERS,
) -> Any:
    try:
        return ort.InferenceSession(
            model,
            session_options,
            providers=list(providers),
            enable_fallback=0,  # which would print, and try the same again
        )
    except Exception as error:  # its own classes share no parent but Exception
        raise ModelFileError(f"{path.name}: {_load_failure(path, error)}") from None


def _check_file(path: Path) -> None:
    try:
        if not is_file(path):
            raise ModelFileError(f"{path.name}: no such file")
        if path.stat().st_size == 0:
            raise ModelFileError(f"{path.name}: the file is empty")
        path.open("rb").close()
    except OSError as error:  # ONNX Runtime says "system error number 13"
        raise ModelFileError(f"{path.name} cannot be read: {error.strerror}") from None


def _session_options(options: EngineOptions) -> Any:
    session_options = ort.SessionOptions()
    session_options.log_severity_level = _LOG_NOTHING
    session_options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    session_options.intra_op_num_threads = options.threads_max
    session_options.inter_op_num_threads = 1
    # Waking a thread for each operator costs a model of 110 us another 30; ONNX Runtime's own way,
    # spinning for milliseconds, takes a whole core from everything else on the host.
    can_spin_briefly = _version() >= _BRIEF_SPINNING_VERSION
    session_options.add_session_config_entry(
        "session.intra_op.allow_spinning", "1" if can_spin_briefly else "0"
    )
    session_options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    session_options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Its arena keeps the peak of every session for ever. malloc is as fast here and gives back:
    # five small models after their first runs take 111 MB with it and 136 MB with the arena.
    session_options.enable_cpu_mem_arena = False
    return session_options


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in ort.__version__.split(".")[:2] if part.isdecimal())


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone by now
        return 0


def _load_failure(path: Path, error: Exception) -> str:
    text = tidy(str(error), path.parent)
    if type(error).__name__ == "InvalidProtobuf":
        if _size_of(path) > _PROTOBUF_BYTES_MAX:
            return (
                "an ONNX file ends at 2 GiB, and this one is larger: keep its weights beside it "
                "(onnx.save_model with save_as_external_data=True)"
            )
        return "not a readable ONNX file, perhaps cut short or damaged"
    if "External data path does not exist" in text:
        return f"weights are missing: {text}"
    return text or "ONNX Runtime refused it without a reason"


def _tensor(path: Path, kind: str, node: Any, *, optional: bool = False) -> TensorSpec:
    dtype = _served_dtype(node.type)
    if dtype is None:
        raise ModelFileError(
            f"{path.name}: {kind} '{node.name}' is a {node.type}, "
            f"expected a tensor of one of {', '.join(dtypes.BY_NAME)}"
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
