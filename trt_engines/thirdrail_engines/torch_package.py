# SPDX-License-Identifier: Apache-2.0
"""The torch engine on a plan of AOTInductor: native code for the CPU or the GPU at hand.

A package holds a shared library. It is loaded only from a plan that our own cache has verified, out
of a folder of its own that is gone when it is loaded.

On CUDA this was not yet run on a GPU.
"""

import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.torch_engine import Program, TorchEngine
from thirdrail_engines.torch_library import LibraryError, TorchLibrary
from thirdrail_engines.torch_plan import read_plan
from thirdrail_engines.torch_sources.reading import tidy


def load_package(
    data: bytes | memoryview, name: str, *, options: EngineOptions, device: str = "cpu"
) -> TorchEngine:
    """data: a plan, which is executable code: only of a cache of ours, and verified.

    name: of the model file, for errors. Raises ModelFileError when the plan cannot be loaded here.
    """
    plan = read_plan(name, data)
    count = len(plan.outputs)
    try:
        library = _load(plan.package, options.instances, device)
        returns = library.outputs()
    except (OSError, LibraryError, zipfile.BadZipFile) as error:
        raise ModelFileError(
            f"{name}: PyTorch {torch.__version__} cannot load what it compiled: {tidy(error)}"
        ) from None
    if returns != count:
        raise ModelFileError(f"{name}: its plan returns {returns} tensors, expected {count}")
    names = [spec.name for spec in plan.inputs]

    def call(tensors: Mapping[str, Any]) -> Sequence[Any]:
        # It was compiled for tensors whose rows follow each other.
        return library.run([tensors[each].contiguous() for each in names], count)

    outputs = tuple(enumerate(plan.outputs))
    program = Program(plan.inputs, outputs, call, check=plan.sizes.check)
    return TorchEngine(program, options, torch.device(device))


def _load(package: memoryview, runs_at_once: int, device: str) -> TorchLibrary:
    """The linker reads files only, and needs no more of one that it has loaded."""
    with tempfile.TemporaryDirectory(prefix="thirdrail-package-") as folder:
        with zipfile.ZipFile(BytesIO(package)) as archive:
            member = next((m for m in archive.namelist() if m.endswith(".so")), None)
            if member is None:
                raise LibraryError("there is no library in it")
            path = Path(archive.extract(member, folder))
        return TorchLibrary(path, runs_at_once, device)
