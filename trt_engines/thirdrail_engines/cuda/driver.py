# SPDX-License-Identifier: Apache-2.0
"""Devices on the CUDA driver API, through cuda.bindings. Every call is checked.

Not yet run on a GPU. What was tested, without one: that each function exists with the arguments
and results that are used here, and all of it against a driver made for the purpose that keeps
device memory on the host (tests/cuda/stub_driver.c).

The primary context is used, which TensorRT and torch use as well: memory and streams are common to
all of them. The driver's calls let other Python threads run.
"""

import ctypes
import threading
from typing import Any

import numpy as np

from thirdrail.tensors import Array
from thirdrail_engines.cuda.activations import Activations
from thirdrail_engines.cuda.device import (
    Capabilities,
    MemoryFigures,
    PeerMemory,
    PinnedMemory,
    SharedEvents,
    SharedMemory,
)
from thirdrail_engines.cuda.driver_streams import DriverEvent, DriverStream
from thirdrail_engines.cuda.errors import CudaError, DeviceFault, error_of
from thirdrail_engines.cuda.identity import DeviceFacts, choose_device, uuid_text
from thirdrail_engines.cuda.runs_under_way import RunsUnderWay
from thirdrail_engines.plans import BuildError, BuildFault

_NAME_BYTES_MAX = 256
_INSTALL = "pip install 'thirdrail[cuda]'"


def open_device(uuid: str = "") -> "DriverDevice":
    """The device that `uuid` names, see `choose_device`. Raises BuildError MISSING."""
    api = _load()
    handles = _devices(api)
    facts = choose_device(uuid, list(handles))
    return DriverDevice(api, handles[facts], facts)


def list_devices() -> tuple[DeviceFacts, ...]:
    """All that this process may use. Raises BuildError MISSING without bindings or driver."""
    return tuple(_devices(_load()))


def device_capabilities(uuid: str) -> Capabilities:
    """Without making a context. Raises BuildError MISSING."""
    api = _load()
    handles = _devices(api)
    return _capabilities(api, handles[choose_device(uuid, list(handles))])


class Api:
    """cuda.bindings.driver, with every result checked."""

    def __init__(self, bindings: Any) -> None:
        self.names: Any = bindings

    def __call__(self, name: str, *arguments: object) -> Any:
        """Call a function. Returns its one result, a tuple of several, None for none."""
        code, *results = getattr(self.names, name)(*arguments)
        if code:
            raise self.error(code, name)
        if len(results) == 1:
            return results[0]
        return tuple(results) or None

    def error(self, code: Any, call: str) -> Exception:
        failed, meaning = self.names.cuGetErrorString(code)
        return error_of(code.name, call, "" if failed else meaning.decode(errors="replace"))


def _load() -> Api:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise BuildError(
            BuildFault.MISSING, f"cuda-bindings is not installed. Run: {_INSTALL}"
        ) from None
    api = Api(driver)
    try:
        (code,) = driver.cuInit(0)
    except Exception as error:  # the class for a missing library depends on the bindings' version
        raise BuildError(
            BuildFault.MISSING, f"no CUDA device: the NVIDIA driver's libcuda.so.1: {error}"
        ) from None
    if code:
        raise BuildError(BuildFault.MISSING, f"no CUDA device: {api.error(code, 'cuInit')}")
    return api


def _devices(api: Api) -> dict[DeviceFacts, Any]:
    """Raises BuildError MISSING, whatever the driver says: nothing was lost that we had."""
    try:
        return _found(api)
    except (CudaError, DeviceFault) as error:
        raise BuildError(BuildFault.MISSING, f"no CUDA device: {error}") from None


def _found(api: Api) -> dict[DeviceFacts, Any]:
    found = {}
    version: int = api("cuDriverGetVersion")
    for ordinal in range(api("cuDeviceGetCount")):
        handle = api("cuDeviceGet", ordinal)
        name = api("cuDeviceGetName", _NAME_BYTES_MAX, handle)
        text = name.split(b"\0")[0].decode(errors="replace")
        facts = DeviceFacts(
            uuid=uuid_text(api("cuDeviceGetUuid", handle).bytes, text),
            name=text,
            compute_capability=(
                _attribute(api, handle, "COMPUTE_CAPABILITY_MAJOR"),
                _attribute(api, handle, "COMPUTE_CAPABILITY_MINOR"),
            ),
            memory_bytes=api("cuDeviceTotalMem", handle),
            driver=(version // 1000, version % 1000 // 10),
        )
        found[facts] = handle
    return found


def _attribute(api: Api, handle: Any, name: str) -> int:
    attribute = getattr(api.names.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    value: int = api("cuDeviceGetAttribute", attribute, handle)
    return value


def _capabilities(api: Api, handle: Any) -> Capabilities:
    def has(name: str) -> bool:
        return bool(_attribute(api, handle, name))

    kinds = api.names.CUmemAllocationHandleType
    pool_kinds = _attribute(api, handle, "MEMPOOL_SUPPORTED_HANDLE_TYPES")
    return Capabilities(
        has_virtual_memory=has("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"),
        has_posix_fds=has("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"),
        has_fabric_handles=has("HANDLE_TYPE_FABRIC_SUPPORTED"),
        has_memory_pools=has("MEMORY_POOLS_SUPPORTED"),
        has_pool_posix_fds=bool(pool_kinds & int(kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)),
        has_ipc_events=has("IPC_EVENT_SUPPORTED"),
        can_register_host=has("HOST_REGISTER_SUPPORTED"),
        can_register_host_read_only=has("READ_ONLY_HOST_REGISTER_SUPPORTED"),
        has_host_pools=has("HOST_NUMA_MEMORY_POOLS_SUPPORTED"),
        is_integrated=has("INTEGRATED"),
    )


class DriverDevice:
    """See Device."""

    def __init__(self, api: Api, handle: Any, facts: DeviceFacts) -> None:
        self._api = api
        self._handle = handle
        self._facts = facts
        self._context: Any = api("cuDevicePrimaryCtxRetain", handle)
        self._entered = threading.local()
        self._capabilities = _capabilities(api, handle)
        self.activations = Activations(self)
        self.runs = RunsUnderWay()

    @property
    def facts(self) -> DeviceFacts:
        return self._facts

    @property
    def ordinal(self) -> int:
        """What this process's driver calls it; it means nothing to any other."""
        return int(self._handle)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def call(self, name: str, *arguments: object) -> Any:
        """Call the driver with this device's context on the calling thread."""
        self.make_current()
        return self._api(name, *arguments)

    def make_current(self) -> None:
        """The context belongs to a thread, and every thread has to ask for it once."""
        if not hasattr(self._entered, "yes"):
            self._api("cuCtxSetCurrent", self._context)
            self._entered.yes = True

    def error(self, code: Any, call: str) -> Exception:
        """What to raise for a call that answered with this code."""
        return self._api.error(code, call)

    @property
    def names(self) -> Any:
        return self._api.names

    def memory(self) -> MemoryFigures:
        return MemoryFigures(*self.call("cuMemGetInfo"))

    def allocate(self, nbytes: int) -> int:
        return int(self.call("cuMemAlloc", nbytes))

    def free(self, address: int) -> None:
        self.call("cuMemFree", address)

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        address = int(self.call("cuMemHostAlloc", nbytes, self.names.CU_MEMHOSTALLOC_PORTABLE))
        return PinnedMemory(address, bytes_at(address, nbytes))

    def free_pinned(self, memory: PinnedMemory) -> None:
        self.call("cuMemFreeHost", memory.address)

    def new_stream(self) -> DriverStream:
        return DriverStream(self)

    def new_event(self) -> DriverEvent:
        return DriverEvent(self)

    def share_memory(self, nbytes: int) -> SharedMemory:
        from thirdrail_engines.cuda.chunks import SharedChunk  # which is made of this module

        return SharedChunk.create(self, nbytes)

    def share_events(self, places: int) -> SharedEvents:
        from thirdrail_engines.cuda.driver_events import DriverEvents

        return DriverEvents(self, places)

    def open_peer(self, handle: bytes) -> PeerMemory:
        from thirdrail_engines.cuda.peer_memory import DriverPeerMemory

        return DriverPeerMemory(self, handle)

    def check(self) -> None:
        self.call("cuMemGetInfo")  # answers at once, and with the sticky error if there is one

    def close(self) -> None:
        self._api("cuDevicePrimaryCtxRelease", self._handle)


def bytes_at(address: int, nbytes: int) -> Array:
    """Host memory as an array of bytes, valid as long as the memory is."""
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    return np.frombuffer(memoryview(memory), np.uint8)
