# SPDX-License-Identifier: Apache-2.0
"""The calls about shared memory, as messages of the registry. CUDA's answer as on a host without a
GPU: nothing can be registered, and there is nothing to show or to unregister."""

from collections.abc import Iterable

from thirdrail.errors import InvalidArgument, NotFound
from thirdrail_server.front.kserve.regions import Region, RegionRegistry
from thirdrail_server.inference import grpc_service_pb2 as pb

_Status = pb.SystemSharedMemoryStatusResponse.RegionStatus


def system_status(registry: RegionRegistry, name: str) -> pb.SystemSharedMemoryStatusResponse:
    """One region, or all for "". Raises NotFound."""
    found: Iterable[Region] = registry.all()
    if name:
        region = registry.find(name)
        if region is None:
            raise NotFound(f"Unable to find system shared memory region: '{name}'")
        found = [region]
    statuses = [
        _Status(name=each.name, key=each.key, offset=each.offset, byte_size=each.size)
        for each in found
    ]
    return pb.SystemSharedMemoryStatusResponse(regions={each.name: each for each in statuses})


def system_unregister(registry: RegionRegistry, name: str) -> None:
    """One region, or all for "". Raises Unimplemented where the server has none."""
    registry.require_enabled()
    for each in [name] if name else [region.name for region in registry.all()]:
        registry.unregister(each)


def cuda_status(registry: RegionRegistry, name: str) -> pb.CudaSharedMemoryStatusResponse:
    if name and registry.find(name) is not None:
        raise NotFound(
            f"The region named '{name}' is registered as system shared memory, not CUDA shared "
            f"memory"
        )
    if name:
        raise NotFound(f"Unable to find cuda shared memory region: '{name}'")
    return pb.CudaSharedMemoryStatusResponse()


def cuda_register(registry: RegionRegistry, name: str) -> None:
    registry.require_enabled()
    raise InvalidArgument(
        f"failed to register CUDA shared memory region: '{name}', GPUs not supported"
    )
