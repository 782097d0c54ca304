# SPDX-License-Identifier: Apache-2.0
"""What a CUDA call's result code means to us. Pure: it imports no bindings.

Names and meanings are those of the driver API's documentation of `CUresult` (CUDA 13.5, and the
docstrings of cuda.bindings repeat it; a test compares). Some errors are sticky: work on the device
went wrong, the state of the whole process's context is unknown, and every later call answers with
the same code.
"""

from thirdrail_engines.engine import DeviceLost, EngineError, EngineMemoryError

# "To continue using CUDA, the process must be terminated and relaunched", says the documentation.
RELAUNCH = frozenset(
    {
        "CUDA_ERROR_CONTAINED",
        "CUDA_ERROR_EXTERNAL_DEVICE",
        "CUDA_ERROR_HARDWARE_STACK_ERROR",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        "CUDA_ERROR_INVALID_PC",
        "CUDA_ERROR_LAUNCH_FAILED",
        "CUDA_ERROR_LAUNCH_TIMEOUT",
        "CUDA_ERROR_MISALIGNED_ADDRESS",
        "CUDA_ERROR_MPS_CLIENT_TERMINATED",
        "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    }
)
# It does not say so of these, and yet nothing of what we hold survives them.
CONTEXT_GONE = frozenset(
    {
        "CUDA_ERROR_ASSERT",  # "the context cannot be used anymore", with all of its memory
        "CUDA_ERROR_CONTEXT_IS_DESTROYED",
        "CUDA_ERROR_DEINITIALIZED",
        "CUDA_ERROR_DEVICE_UNAVAILABLE",  # it was available when we opened it
        "CUDA_ERROR_ECC_UNCORRECTABLE",  # memory, maybe weights, is not what was written
        "CUDA_ERROR_MPS_RPC_FAILURE",
        "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        "CUDA_ERROR_UNKNOWN",  # a restart costs seconds, wrong answers cost more
    }
)
STICKY = RELAUNCH | CONTEXT_GONE


class CudaError(EngineError):
    """A CUDA call failed; the device goes on. code: its name, as CUresult has it."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class OutOfDeviceMemory(CudaError, EngineMemoryError):
    """The device, or the host's memory that it can reach, has no room."""


class DeviceFault(DeviceLost):
    """A sticky error. code: its name, as CUresult has it."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def error_of(code: str, call: str, meaning: str = "") -> CudaError | DeviceFault:
    """What to raise for a call that answered with `code`.

    call: the function's name. meaning: the driver's sentence about the code. A code may tell of
    work that was given to the device earlier: the call is where it came up, not always its cause.
    """
    text = f"{call}: {code.removeprefix('CUDA_ERROR_').lower().replace('_', ' ')}"
    if meaning:
        text += f" ({meaning})"
    if code in STICKY:
        return DeviceFault(code, f"the device was lost: {text}")
    if code == "CUDA_ERROR_OUT_OF_MEMORY":
        return OutOfDeviceMemory(code, text)
    return CudaError(code, text)
