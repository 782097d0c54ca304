# SPDX-License-Identifier: Apache-2.0
"""What this host has to run models: CUDA devices, and the packages that use them.

The driver itself is asked for devices, so that no package is needed for it. The functions are those
of the CUDA driver API (cuda.h). Not yet run on a GPU.
"""

import ctypes
import functools
import uuid
from dataclasses import dataclass
from importlib.util import find_spec

from thirdrail_engines.engine_choice import TORCH_SUFFIXES, Host

_LIBRARY = "libcuda.so.1"
_DEVICES_MAX = 64
_NAME_BYTES = 256
# CUdevice_attribute
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """driver: the newest CUDA version that it can run, as 13.0."""

    ordinal: int
    uuid: str  # as nvidia-smi writes it
    name: str
    capability: str  # "sm120"
    driver: str


@functools.cache
def cuda_devices() -> tuple[CudaDevice, ...]:
    """The devices that this process may use, as CUDA orders them; none without a driver."""
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        return ()
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return tuple(_device(cuda, n, driver) for n in range(min(count.value, _DEVICES_MAX)))


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


def _device(cuda: ctypes.CDLL, ordinal: int, driver: str) -> CudaDevice:
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    raw = (ctypes.c_ubyte * 16)()
    cuda.cuDeviceGetUuid_v2(raw, device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return CudaDevice(
        ordinal,
        f"GPU-{uuid.UUID(bytes=bytes(raw))}",
        name.value.decode(errors="replace"),
        f"sm{major.value}{minor.value}",
        driver,
    )
