# SPDX-License-Identifier: Apache-2.0
"""What this host has to run models: CUDA devices, and the packages that use them.

Looked up once. With a GPU this was not yet run.
"""

import ctypes
import functools
from importlib.util import find_spec

from thirdrail_engines.cuda.identity import DeviceFacts
from thirdrail_engines.engine import EngineError
from thirdrail_engines.engine_choice import TORCH_SUFFIXES, Host
from thirdrail_engines.plans import BuildError

_DRIVER = "libcuda.so.1"


def cuda_devices() -> tuple[DeviceFacts, ...]:
    """The devices that this process may use, as CUDA orders them."""
    return _found()[0]


def why_no_cuda_device() -> str:
    """Why `cuda_devices` finds none, and what would help."""
    return _found()[1]


def host_of(suffix: str) -> Host:
    """What counts for a source of this kind. Quick where there is no GPU."""
    has_torch = suffix in TORCH_SUFFIXES and find_spec("torch") is not None
    if not cuda_devices():
        return Host(has_torch=has_torch)
    import onnxruntime

    from thirdrail_engines.tensorrt import installed_builders

    return Host(
        has_cuda=True,
        tensorrts=tuple(builder for builder, _ in installed_builders()),
        has_torch=has_torch,
        has_onnxruntime_cuda="CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    )


@functools.cache
def _found() -> tuple[tuple[DeviceFacts, ...], str]:
    try:
        ctypes.CDLL(_DRIVER)  # spares most hosts the import of the bindings
    except OSError:
        return (), f"there is no CUDA device here, as there is no NVIDIA driver ({_DRIVER})"
    from thirdrail_engines.cuda.driver import list_devices

    try:
        return list_devices(), "the NVIDIA driver shows no CUDA device to this process"
    except (BuildError, EngineError) as error:
        return (), str(error)
