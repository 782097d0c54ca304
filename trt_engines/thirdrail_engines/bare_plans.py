# SPDX-License-Identifier: Apache-2.0
"""A TensorRT plan that was brought from elsewhere, without the model that it was built from.

It can be neither built anew nor proven: what it was built with is what must be here.
"""

from pathlib import Path

from thirdrail_engines.compiling import CompileServices
from thirdrail_engines.cuda_engines import open_bare_plan
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.engine_report import EngineReport, LoadedEngine
from thirdrail_engines.plans import BuildError
from thirdrail_engines.tensorrt import describe_plan, read_header


def load_bare_plan(path: Path, services: CompileServices | None) -> LoadedEngine:
    """Raises ModelFileError, which names what the plan was built with and what runs here."""
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ModelFileError(f"{path.name} cannot be read: {reason}") from None
    header = read_header(data)
    if header is None:
        raise ModelFileError(f"{path.name}: {describe_plan(data)}")
    try:
        engine = open_bare_plan(data, path, header.builder, services or CompileServices())
    except BuildError as error:
        raise BuildError(error.fault, f"{path.name}: {error}; {describe_plan(data)}") from None
    return LoadedEngine(engine, EngineReport(f"{header.builder} on cuda"))
