# SPDX-License-Identifier: Apache-2.0
"""The torch engine on a plan of AOTInductor: native code for the CPU or the GPU at hand.

A package is a shared library. It is loaded only from a plan that our own cache has verified, out of
a folder of its own that is gone when it is loaded.

PyTorch's binding keeps Python's lock for the length of a run (seen with 2.13, and known there as
issue 197516): the process' other threads wait so long.

On CUDA this was not yet run on a GPU.
"""

import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import torch

from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.torch_engine import Program, TorchEngine
from thirdrail_engines.torch_plan import read_plan
from thirdrail_engines.torch_sources.exported import tidy

_MODEL = "model"  # what AOTInductor calls the only model in a package


def load_package(
    data: bytes | memoryview, name: str, *, options: EngineOptions, device: str = "cpu"
) -> TorchEngine:
    """data: a plan, which is executable code: only of a cache of ours, and verified.

    name: of the model file, for errors. Raises ModelFileError when the plan cannot be loaded here.
    """
    plan = read_plan(name, data)
    try:
        package = _load(plan.package, options.instances)
    except Exception as error:  # its parts raise whatever they happen to
        raise ModelFileError(
            f"{name}: PyTorch {torch.__version__} cannot load what it compiled: {tidy(error)}"
        ) from None
    names = [spec.name for spec in plan.inputs]

    def call(tensors: Mapping[str, Any]) -> Sequence[Any]:
        # It was compiled for tensors whose rows follow each other.
        returned: list[Any] = package.run([tensors[each].contiguous() for each in names])
        return returned

    outputs = tuple(enumerate(plan.outputs))
    program = Program(plan.inputs, outputs, call, check=plan.sizes.check)
    return TorchEngine(program, options, torch.device(device))


def _load(package: memoryview, runs_at_once: int) -> Any:
    """From a folder of ours: PyTorch would keep one as long as the engine, and leave it behind when
    the process is killed."""
    with tempfile.TemporaryDirectory(prefix="thirdrail-package-") as folder:
        with zipfile.ZipFile(BytesIO(package)) as archive:
            archive.extractall(folder)
        return torch._C._aoti.AOTIModelPackageLoader(folder, _MODEL, False, runs_at_once, -1)
