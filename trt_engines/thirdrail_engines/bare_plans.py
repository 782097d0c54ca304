# SPDX-License-Identifier: Apache-2.0
"""A TensorRT plan that was brought from elsewhere, without the model that it was built from.

It can be neither built anew nor proven: what it was built with is what must be here.
"""

from pathlib import Path

from thirdrail_engines.engine import Engine, ModelFileError
from thirdrail_engines.engine_report import EngineReport, LoadedEngine
from thirdrail_engines.host import cuda_devices, why_no_cuda_device
from thirdrail_engines.one_engine import TENSORRT_ENGINE, own_module
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.plans import BuildError, BuildFault
from thirdrail_engines.tensorrt import describe_plan, read_header


def load_bare_plan(path: Path, options: EngineOptions) -> LoadedEngine:
    """Raises ModelFileError, which names what the plan was built with and what runs here."""
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ModelFileError(f"{path.name} cannot be read: {reason}") from None
    header = read_header(data)
    devices = cuda_devices()
    gpu = f"{devices[0].name} ({devices[0].capability_name})" if devices else ""
    if header is None:
        raise ModelFileError(f"{path.name}: {describe_plan(data, gpu=gpu)}")
    if not devices:
        raise BuildError(
            BuildFault.MISSING,
            f"{path.name} needs a GPU: {why_no_cuda_device()}; {describe_plan(data)}",
        )
    try:
        module = own_module(TENSORRT_ENGINE, "run TensorRT plans")
        engine: Engine = module.load_plan(data, header.builder, options=options)
    except ModelFileError as error:
        text = f"{path.name} cannot be loaded: {error}; {describe_plan(data, gpu=gpu)}"
        raise ModelFileError(text) from None
    return LoadedEngine(engine, EngineReport(f"{header.builder} on cuda"))
