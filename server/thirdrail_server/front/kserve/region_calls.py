# SPDX-License-Identifier: Apache-2.0
"""The calls about shared memory, as messages of the registry."""

from thirdrail.errors import NotFound
from thirdrail_server.front.kserve.cuda_regions import CudaRegion
from thirdrail_server.front.kserve.regions import Region, RegionRegistry
from thirdrail_server.inference import grpc_service_pb2 as pb

_Status = pb.SystemSharedMemoryStatusResponse.RegionStatus
_CudaStatus = pb.CudaSharedMemoryStatusResponse.RegionStatus


def system_status(registry: RegionRegistry, name: str) -> pb.SystemSharedMemoryStatusResponse:
    """One region, or all for "". Raises NotFound."""
    found = [each for each in registry.all() if isinstance(each, Region)]
    if name:
        region = registry.find(name)
        if region is None:
            raise NotFound(f"Unable to find system shared memory region: '{name}'")
        if not isinstance(region, Region):
            raise NotFound(
                f"The region named '{name}' is registered as CUDA shared memory, not system "
                "shared memory"
            )
        found = [region]
    statuses = [
        _Status(name=each.name, key=each.key, offset=each.offset, byte_size=each.size)
        for each in found
    ]
    return pb.SystemSharedMemoryStatusResponse(regions={each.name: each for each in statuses})


def system_unregister(registry: RegionRegistry, name: str) -> None:
    """One region, or all for "". Raises Unimplemented where the server has none."""
    _unregister(registry, name, Region)


def cuda_status(registry: RegionRegistry, name: str) -> pb.CudaSharedMemoryStatusResponse:
    """One region, or all for "". Raises NotFound."""
    found = [each for each in registry.all() if isinstance(each, CudaRegion)]
    if name:
        region = registry.find(name)
        if region is None:
            raise NotFound(f"Unable to find cuda shared memory region: '{name}'")
        if not isinstance(region, CudaRegion):
            raise NotFound(
                f"The region named '{name}' is registered as system shared memory, not CUDA "
                "shared memory"
            )
        found = [region]
    statuses = [
        _CudaStatus(name=each.name, device_id=each.device_id, byte_size=each.size) for each in found
    ]
    return pb.CudaSharedMemoryStatusResponse(regions={each.name: each for each in statuses})


def cuda_unregister(registry: RegionRegistry, name: str) -> None:
    """One region, or all on devices for "". Raises Unimplemented where the server has none."""
    _unregister(registry, name, CudaRegion)


def _unregister(registry: RegionRegistry, name: str, kind: type[Region] | type[CudaRegion]) -> None:
    """What is unknown, or of the other kind, stays as it is, and that is no error."""
    registry.require_enabled()
    for each in registry.all():
        if isinstance(each, kind) and name in ("", each.name):
            registry.unregister(each)
