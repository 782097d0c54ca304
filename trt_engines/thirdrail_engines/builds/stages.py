# SPDX-License-Identifier: Apache-2.0
"""The steps of a build, in the process that builds: source, precision, plan."""

import errno
import importlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from thirdrail_engines.builds import wire
from thirdrail_engines.builds.result import Built
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.plans import Builder, BuildFault, Precision, TellProgress

# Imported by name and only when their turn comes: each needs packages that may not be installed.
_TORCH_SOURCES = "thirdrail_engines.torch_sources"
_PRECISION = "thirdrail_engines.precision"
_BUILDERS = {
    Builder.ONNXRUNTIME: "thirdrail_engines.builders.onnxruntime_builder",
    Builder.TENSORRT: "thirdrail_engines.tensorrt.builder",
    Builder.TENSORRT_RTX: "thirdrail_engines.tensorrt.builder",
}
# What to install for a package that is missing.
_INSTALLED_BY = {
    "onnx": "thirdrail[server]",
    "onnxruntime": "thirdrail[server]",
    "torch": "thirdrail[torch]",
    "onnxscript": "thirdrail[torch]",
    "tensorrt_rtx": "thirdrail[tensorrt]",
}
_TOLD_S_MIN = 0.05
_PHASE_CHARS_MAX = 100


def build(order: wire.Order, tell: TellProgress) -> wire.Result:
    """Raises BuildError, and whatever the libraries raise."""
    request, onnx = order.request, order.request.source
    conversion: Mapping[str, object] | None = None
    if request.source.suffix in (".pt2", ".pt"):
        onnx = _module(_TORCH_SOURCES).to_onnx(request.source, order.folder, tell)
    if request.precision is not Precision.AS_IS:
        converted = _module(_PRECISION).convert(onnx, request.precision, order.folder, tell)
        onnx, conversion = converted.path, converted.report
    built: Built = _module(_BUILDERS[request.builder]).build(request, onnx, order.folder, tell)
    return wire.Result(
        built.plan.name,
        built.layers,
        built.source_layers,
        built.tensors,
        conversion,
        built.warnings,
    )


class Throttle:
    """Passes progress on at a bearable rate: at once when the phase changes or ends, else now and
    then. From any thread."""

    def __init__(self, send: Callable[[wire.Progress], None]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._phase = ""
        self._told_s = 0.0

    def tell(self, phase: str, done: int, steps: int) -> None:
        phase = phase[:_PHASE_CHARS_MAX]
        now = time.monotonic()
        with self._lock:
            is_news = phase != self._phase or (steps > 0 and done >= steps)
            if not is_news and now < self._told_s + _TOLD_S_MIN:
                return
            self._phase, self._told_s = phase, now
            self._send(wire.Progress(phase, max(0, done), max(0, steps)))


def fault_of(error: Exception) -> BuildFault:
    match error:
        case ImportError():
            return BuildFault.MISSING
        case MemoryError():
            return BuildFault.OUT_OF_MEMORY
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return BuildFault.OUT_OF_DISK
        case ModelFileError():
            return BuildFault.REFUSED
    return BuildFault.CRASHED


def words_of(error: Exception) -> str:
    match error:
        case ImportError(name=str() as name):
            package = name.partition(".")[0]
            line = _INSTALLED_BY.get(package, package)
            return f"the package '{package}' is missing: pip install '{line}'"
        case ModelFileError():
            return str(error)
        case MemoryError():
            return "the system gave the build no more memory"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"no space left to write {error.filename or 'the plan'}"
    return f"{type(error).__name__}: {error}"


def _module(name: str) -> Any:
    return importlib.import_module(name)
