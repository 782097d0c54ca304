# SPDX-License-Identifier: Apache-2.0
"""What a configuration says about compiling the model -> CompileOptions.

Ours are `parameters`; where they are silent, Triton's words count: the platform or backend, and
the TensorRT accelerator of `optimization`. Where those are silent too, the server's defaults.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from thirdrail.errors import InvalidArgument
from thirdrail_engines.compile_options import (
    CompileOptions,
    EngineChoice,
    OnFailure,
    read_compile_options,
)
from thirdrail_engines.plans import Precision
from thirdrail_engines.profiles import BatchRows, config_line
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig, ModelOptimizationPolicy
from thirdrail_server.repository.errors import RepositoryError


def _installed_tensorrt() -> EngineChoice:
    """Which of the two packages Triton's word for TensorRT means here."""
    is_other = find_spec("tensorrt") is None and find_spec("tensorrt_rtx") is not None
    return EngineChoice.TENSORRT_RTX if is_other else EngineChoice.TENSORRT


ENGINES_BY_PLATFORM = {
    "onnxruntime": EngineChoice.AUTO,  # the kind of file; `engine` says what it shall run on
    "onnxruntime_onnx": EngineChoice.AUTO,
    "tensorrt": EngineChoice.TENSORRT,  # or that for RTX, where only it is installed
    "tensorrt_plan": EngineChoice.TENSORRT,
    "tensorrt_rtx": EngineChoice.TENSORRT_RTX,
    "pytorch": EngineChoice.AUTO,
    "pytorch_libtorch": EngineChoice.AUTO,
    "pytorch_exported": EngineChoice.AUTO,  # ours, of a program of torch.export
}
ACCELERATOR = "tensorrt"
PRECISION_MODES = {"FP32": Precision.AS_IS, "FP16": Precision.FP16, "BF16": Precision.BF16}
_MIB = 1 << 20

Accelerator = ModelOptimizationPolicy.ExecutionAccelerators.Accelerator


def compile_options(
    config: ModelConfig, *, on_failure: OnFailure, derive_batch_rows: int = 0
) -> CompileOptions:
    """on_failure: the server's, for a model that says nothing.

    derive_batch_rows: the rows that a model without a configuration may come to batch.
    Raises RepositoryError for a value that cannot be, with a line that would do.
    """
    given = {key: value.string_value for key, value in config.parameters.items()}
    words = {"on_compile_failure": on_failure.value, **dict(_of_triton(config)), **given}
    try:
        options = read_compile_options(words, batch_rows(config, derive_batch_rows))
    except InvalidArgument as error:
        raise RepositoryError(str(error)) from None
    if options.serve_while_compiling and options.on_failure is OnFailure.FAIL:
        raise RepositoryError(
            "serve_while_compiling answers from ONNX Runtime until the engine is there, which "
            "on_compile_failure forbids; write "
            + config_line("on_compile_failure", OnFailure.FALLBACK.value)
        )
    return options


def batch_rows(config: ModelConfig, derive_batch_rows: int = 0) -> BatchRows | None:
    """What the configuration says about the rows of a run; None: one request is one run."""
    if config.max_batch_size > 0:
        preferred = [
            size
            for size in config.dynamic_batching.preferred_batch_size
            if 0 < size <= config.max_batch_size
        ]
        return BatchRows(max(preferred, default=config.max_batch_size), config.max_batch_size)
    if derive_batch_rows > 0:
        return BatchRows(derive_batch_rows, derive_batch_rows, is_promised=False)
    return None


def keep_engine(config: ModelConfig) -> None:
    """Say in a parameter which engine the platform or backend asks for, if it does."""
    if "engine" in config.parameters:
        return
    wish = dict(_of_platform(config)).get("engine")
    if wish is not None:
        config.parameters["engine"].string_value = wish


def _of_triton(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Triton's words in ours; later ones count more."""
    yield from _of_platform(config)
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    for accelerator in accelerators:
        if accelerator.name == ACCELERATOR:
            yield "engine", _installed_tensorrt().value
            yield from _of_accelerator(accelerator.parameters)


def _of_platform(config: ModelConfig) -> Iterator[tuple[str, str]]:
    for name in (config.platform, config.backend):
        choice = ENGINES_BY_PLATFORM.get(name, EngineChoice.AUTO)
        if choice is EngineChoice.TENSORRT:
            choice = _installed_tensorrt()
        if choice is not EngineChoice.AUTO:
            yield "engine", choice.value


def _of_accelerator(parameters: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    mode = PRECISION_MODES.get(parameters.get("precision_mode", "").upper())
    if mode is not None:
        yield "precision", mode.value
    size = parameters.get("max_workspace_size_bytes", "")
    if size:
        yield "workspace_mib", str(max(1, int(size) // _MIB))


def accelerator_refusal(accelerator: Accelerator) -> str | None:
    """Why an accelerator's parameters cannot be honoured; None: they can."""
    mode = accelerator.parameters.get("precision_mode", "")
    if mode and mode.upper() not in PRECISION_MODES:
        return (
            f"precision_mode {mode[:80]!a} is none of {', '.join(PRECISION_MODES)}; INT8 and FP8 "
            "come from the graph, which must have quantisation nodes (Q/DQ)"
        )
    size = accelerator.parameters.get("max_workspace_size_bytes", "")
    if size and not (size.isascii() and size.isdecimal() and 0 < len(size) <= 15 and int(size)):
        return f"max_workspace_size_bytes must be a number of bytes above 0, got {size[:80]!a}"
    return None


def accelerator_warning(accelerator: Accelerator) -> str | None:
    """What of an accelerator has no effect."""
    if accelerator.name != ACCELERATOR:
        return f"'{accelerator.name[:80]}' is not known here, only '{ACCELERATOR}'"
    known = ("precision_mode", "max_workspace_size_bytes")
    unknown = sorted(key for key in accelerator.parameters if key not in known)
    if unknown:
        return f"{', '.join(key[:80] for key in unknown[:5])} not known, only {', '.join(known)}"
    return None
