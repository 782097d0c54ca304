# SPDX-License-Identifier: Apache-2.0
"""The calls about shared memory, as messages of the registry."""

from typing import TypeVar

from thirdrail.errors import NotFound
from thirdrail_server.front.kserve.cuda_regions import CudaRegion
from thirdrail_server.front.kserve.regions import Region, RegionRegistry
from thirdrail_server.inference import grpc_service_pb2 as pb

_Status = pb.SystemSharedMemoryStatusResponse.RegionStatus
_CudaStatus = pb.CudaSharedMemoryStatusResponse.RegionStatus
_Kind = TypeVar("_Kind", Region, CudaRegion)

_NAMES = {Region: "system", CudaRegion: "CUDA"}


def system_status(registry: RegionRegistry, name: str) -> pb.SystemSharedMemoryStatusResponse:
    """One region, or all for "". Raises NotFound."""
    statuses = {
        each.name: _Status(name=each.name, key=each.key, offset=each.offset, byte_size=each.size)
        for each in _found(registry, name, Region)
    }
    return pb.SystemSharedMemoryStatusResponse(regions=statuses)


def system_unregister(registry: RegionRegistry, name: str) -> None:
    """One region, or all for "". Raises Unimplemented where the server has none."""
    _unregister(registry, name, Region)


def cuda_status(registry: RegionRegistry, name: str) -> pb.CudaSharedMemoryStatusResponse:
    """One region, or all for "". Raises NotFound."""
    statuses = {
        each.name: _CudaStatus(name=each.name, device_id=each.device_id, byte_size=each.size)
        for each in _found(registry, name, CudaRegion)
    }
    return pb.CudaSharedMemoryStatusResponse(regions=statuses)


def cuda_unregister(registry: RegionRegistry, name: str) -> None:
    """One region, or all on devices for "". Raises Unimplemented where the server has none."""
    _unregister(registry, name, CudaRegion)


def _found(registry: RegionRegistry, name: str, kind: type[_Kind]) -> list[_Kind]:
    if not name:
        return [each for each in registry.all() if isinstance(each, kind)]
    region = registry.find(name)
    if region is None:
        raise NotFound(f"Unable to find {_NAMES[kind].lower()} shared memory region: '{name}'")
    if not isinstance(region, kind):
        raise NotFound(
            f"The region named '{name}' is registered as {_NAMES[type(region)]} shared memory, not "
            f"{_NAMES[kind]} shared memory"
        )
    return [region]


def _unregister(registry: RegionRegistry, name: str, kind: type[Region] | type[CudaRegion]) -> None:
    """What is unknown, or of the other kind, stays as it is, and that is no error."""
    registry.require_enabled()
    for each in registry.all():
        if isinstance(each, kind) and name in ("", each.name):
            registry.unregister(each)
