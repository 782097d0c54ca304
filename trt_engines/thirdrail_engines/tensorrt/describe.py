# SPDX-License-Identifier: Apache-2.0
"""What to say of a plan that was brought from elsewhere and does not load."""

from thirdrail_engines.plans import Builder, BuildError
from thirdrail_engines.tensorrt.api import installed_builders, load_api, title_of
from thirdrail_engines.tensorrt.callbacks import Messages, make_logger
from thirdrail_engines.tensorrt.plan_header import PlanHeader, read_header

# EngineInvalidityDiagnostics, in words.
_DIAGNOSTICS = {
    "VERSION_MISMATCH": "it wants the version that built it",
    "UNSUPPORTED_CC": "it was not built for this GPU",
    "OLD_CUDA_DRIVER": "the CUDA driver is too old",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    "INSUFFICIENT_GPU_MEMORY": "this GPU has too little memory",
    "MALFORMED_ENGINE": "its bytes are damaged",
    "CUDA_ERROR": "CUDA or its driver is not installed properly",
}


def describe_plan(plan: bytes, *, gpu: str = "") -> str:
    """What it was built with, what runs here, what is known to be wrong. One line, no full stop.

    gpu: the one at hand, in words that tell its compute capability; "": none is known.
    """
    header = read_header(plan)
    here = _running_here(gpu)
    if header is None:
        return f"no TensorRT plan by its first bytes; here: {here}"
    built = f"built with {title_of(header.builder)} {header.version}"
    if header.capabilities:
        built += f" for {', '.join(header.capabilities)}"
    faults = _faults(plan, header)
    return "; ".join([built, f"here: {here}", *faults])


def _running_here(gpu: str) -> str:
    packages = [f"{title_of(builder)} {version}" for builder, version in installed_builders()]
    return ", ".join([*(packages or ["no TensorRT"]), gpu or "no GPU known"])


def _faults(plan: bytes, header: PlanHeader) -> list[str]:
    if header.plan_bytes is not None and header.plan_bytes != len(plan):
        return [f"damaged: {len(plan)} bytes of {header.plan_bytes}"]
    installed = dict(installed_builders())
    version = installed.get(header.builder)
    if version is None:
        return [f"it needs {title_of(header.builder)}, which is not installed"]
    if not _is_same(version, header.version):
        return [f"it needs version {header.version}, or to be built anew"]
    return _package_finds(plan, header.builder)


def _is_same(installed: str, built: str) -> bool:
    """A package's version may have fewer numbers than the four of a header, or a suffix."""
    return all(
        mine == theirs for mine, theirs in zip(installed.split("."), built.split("."), strict=False)
    )


def _package_finds(plan: bytes, builder: Builder) -> list[str]:
    try:
        api = load_api(builder)
    except BuildError as error:
        return [str(error)]
    messages = Messages()
    found = api.engine_validity(plan, make_logger(api.trt, messages))
    if not found and messages.errors:  # for want of a GPU: it then looks at nothing else
        return ["whether it fits a GPU was not checked: none works here"]
    return [_DIAGNOSTICS.get(name, name) for name in found]
