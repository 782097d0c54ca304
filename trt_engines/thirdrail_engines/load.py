# SPDX-License-Identifier: Apache-2.0
"""From a model file to an engine: the choice by the file's name."""

from pathlib import Path

from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.engine_report import EngineReport, LoadedEngine
from thirdrail_engines.inspector import Inspector
from thirdrail_engines.options import EngineOptions

_NOT_YET = {
    ".plan": "TensorRT plans",
    ".engine": "TensorRT plans",
    ".pt2": "exported PyTorch programs",
    ".pt": "TorchScript files",
    ".py": "Python models",
}


def load(path: Path, *, options: EngineOptions, inspector: Inspector | None = None) -> LoadedEngine:
    """Load the model file at `path`.

    inspector: one that several loads share, so that they start one child process between them.
    Raises ModelFileError when the file cannot be read, or this build does not serve its kind.
    """
    if path.suffix == ".onnx":
        if inspector is None:
            with Inspector() as own:
                return _load_onnx(path, options, own)
        return _load_onnx(path, options, inspector)
    if path.suffix in _NOT_YET:
        raise ModelFileError(
            f"{path.name}: this build does not serve {_NOT_YET[path.suffix]} yet, "
            "only ONNX files (model.onnx)"
        )
    raise ModelFileError(f"{path.name}: unknown kind of model file, expected model.onnx")


def _load_onnx(path: Path, options: EngineOptions, inspector: Inspector) -> LoadedEngine:
    # Imported late: the child that inspects graphs imports this package and runs nothing.
    from thirdrail_engines.onnxruntime_engine import load_onnx

    engine = load_onnx(path, options=options, inspector=inspector)
    return LoadedEngine(engine, EngineReport("onnxruntime"))
