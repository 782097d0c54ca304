# SPDX-License-Identifier: Apache-2.0
"""The steps of a build, in the process that builds: source, precision, plan."""

import errno
import importlib
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from thirdrail_engines.builds import wire
from thirdrail_engines.builds.result import Built
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.expectations import ReferenceRequest
from thirdrail_engines.plans import (
    Builder,
    BuildError,
    BuildFault,
    PlanRequest,
    Precision,
    TellProgress,
)

# Imported by name and only when their turn comes: each needs packages that may not be installed.
_TORCH_SOURCES = "thirdrail_engines.torch_sources"
_PRECISION = "thirdrail_engines.precision"
_REFERENCE = "thirdrail_engines.builders.reference"
_BUILDERS = {
    Builder.ONNXRUNTIME: "thirdrail_engines.builders.onnxruntime_builder",
    Builder.TENSORRT: "thirdrail_engines.tensorrt.builder",
    Builder.TENSORRT_RTX: "thirdrail_engines.tensorrt.builder",
    Builder.AOT_INDUCTOR: "thirdrail_engines.builders.aot_inductor_builder",
}
_TAKES_TORCH = (Builder.AOT_INDUCTOR,)  # and the others ONNX
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
_PROBE_BYTES = 1 << 20


def carry_out(order: wire.Order, tell: TellProgress) -> wire.Result:
    """Raises BuildError, and whatever the libraries raise."""
    if isinstance(order.request, ReferenceRequest):
        expected: Path = _module(_REFERENCE).compute(order.request, order.folder)
        return wire.Result(expected.name, {}, {}, (), None, ())
    return _build(order.request, order.folder, tell)


def _build(request: PlanRequest, folder: Path, tell: TellProgress) -> wire.Result:
    model = request.source
    conversion: Mapping[str, object] | None = None
    is_torch = model.suffix in (".pt2", ".pt")
    if is_torch and request.builder not in _TAKES_TORCH:
        model = _module(_TORCH_SOURCES).to_onnx(model, folder, tell, request.profiles)
    if request.precision is not Precision.AS_IS:
        converted = _module(_PRECISION).convert(
            model, request.precision, folder, tell, request.profiles
        )
        model, conversion = converted.path, converted.report
    built: Built = _module(_BUILDERS[request.builder]).build(request, model, folder, tell)
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


def refusal_of(error: Exception, folder: Path) -> wire.Refusal:
    """What to tell about an error that ended a build."""
    fault, text = _described(error)
    if fault in (BuildFault.REFUSED, BuildFault.CRASHED) and _is_full(folder):
        # Libraries that write files seldom say why they could not.
        return wire.Refusal(BuildFault.OUT_OF_DISK, f"no space left in {folder.parent}: {text}")
    return wire.Refusal(fault, text)


def _described(error: Exception) -> tuple[BuildFault, str]:
    match error:
        case BuildError():
            return error.fault, str(error)
        case ModelFileError():
            return BuildFault.REFUSED, str(error)
        case ModuleNotFoundError(name=str() as name):
            package = name.partition(".")[0]
            line = _INSTALLED_BY.get(package, package)
            return BuildFault.MISSING, f"the package '{package}' is missing: pip install '{line}'"
        case ImportError():  # there, but not what it needs
            return BuildFault.MISSING, f"{error}"
        case MemoryError():
            return BuildFault.OUT_OF_MEMORY, "the system gave the build no more memory"
    return BuildFault.CRASHED, f"{type(error).__name__}: {error}"


def _is_full(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def _module(name: str) -> Any:
    return importlib.import_module(name)
