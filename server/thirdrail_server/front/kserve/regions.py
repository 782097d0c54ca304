# SPDX-License-Identifier: Apache-2.0
"""The shared-memory regions that clients have registered, and what one request uses of them.

There is one name space for all clients, as Triton's clients and tools expect: whoever may call the
server may use, see and unregister every region. A region that is unregistered while requests use it
is shown until the last of them has ended, and takes no new ones.

A region is a piece of a file, or memory on a device: cuda_regions.py.
"""

import itertools
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Union

from thirdrail.dtypes import Buffer
from thirdrail.errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from thirdrail.lane.input_arena import Source
from thirdrail_server.config import RegionLimits, ServerConfig
from thirdrail_server.front.kserve.cuda_regions import (
    CudaPart,
    CudaRegion,
    RegionWorker,
    bad_arguments,
    check_cuda,
    no_device,
)
from thirdrail_server.front.kserve.parameters import RegionRange
from thirdrail_server.front.kserve.region_file import RegionFile, checked_key, open_region

_DISABLED_TEXT = (
    "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
)
_SIZE_MAX = (1 << 64) - 1  # what Triton computes with; clients' tests know where it overflows


@dataclass(slots=True)
class Region:
    """`size` bytes of a file from `offset` on."""

    name: str
    key: str
    offset: int
    size: int
    file: RegionFile
    requests: int = 0  # in flight, that use it
    is_leaving: bool = False  # unregistered, but in use

    def close(self) -> None:
        self.file.close()


AnyRegion = Region | CudaRegion
AnyPart = Union["RegionPart", CudaPart]


class RegionRegistry:
    """All regions of one server."""

    def __init__(
        self,
        limits: RegionLimits,
        *,
        is_enabled: bool,
        owners: Collection[int] | None,
        gpus: Sequence[RegionWorker] = (),
    ) -> None:
        """owners: the user ids whose memory may be registered; None: anybody's.

        gpus: the workers of the devices, by number.
        """
        self._limits = limits
        self._is_enabled = is_enabled
        self._owners = owners
        self._gpus = gpus
        self._numbers = itertools.count(1)
        self._regions: dict[str, AnyRegion] = {}

    @classmethod
    def of(cls, config: ServerConfig, gpus: Sequence[RegionWorker]) -> "RegionRegistry":
        """Memory may be the server's own user's, and that of users who may attach to its lane."""
        uids = config.worker.sessions.uids
        owners = None if uids is None else {os.geteuid(), *uids}
        return cls(config.regions, is_enabled=config.allow_client_shm, owners=owners, gpus=gpus)

    @property
    def extensions(self) -> Sequence[str]:
        """As KServe's metadata names them."""
        if not self._is_enabled:
            return ()
        return ("system_shared_memory", "cuda_shared_memory")[: 2 if self._gpus else 1]

    @property
    def count(self) -> int:
        return len(self._regions)

    @property
    def total_bytes(self) -> int:
        return sum(region.size for region in self._regions.values())

    def require_enabled(self) -> None:
        """Raises Unimplemented."""
        if not self._is_enabled:
            raise Unimplemented(_DISABLED_TEXT)

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        """Raises a ThirdrailError, and then nothing has changed."""
        self._check_name(name)
        checked_key(name, key)
        self._check_room(name)
        file = open_region(name, key, self._owners)
        if size < 1 or offset + size > file.size:
            file.close()
            raise InvalidArgument(f"failed to register shared memory region '{name}': invalid args")
        self._regions[name] = Region(name, key, offset, size, file)

    async def register_cuda(self, name: str, handle: bytes, device_id: int, size: int) -> None:
        """The same for memory on a device; the name is taken while its worker opens it."""
        self._check_name(name)
        self._check_room(name)
        check_cuda(name, handle, device_id, len(self._gpus))
        number = next(self._numbers)
        region = CudaRegion(
            name, number, device_id, size, handle, self._gpus[device_id], requests=1
        )
        self._regions[name] = region
        try:
            await region.open()
        except NotFound:
            region.is_leaving = True
            raise no_device(name) from None
        except InvalidArgument as error:
            region.is_leaving = True
            raise bad_arguments(name, error.message) from None
        except BaseException:
            region.is_leaving = True
            raise
        finally:
            self.give_back(region)

    def find(self, name: str) -> AnyRegion | None:
        region = self._regions.get(name)
        return region if region in self.all() else None

    def all(self) -> list[AnyRegion]:
        """Those that are registered, not those that are about to be."""
        return [
            each
            for each in self._regions.values()
            if not isinstance(each, CudaRegion) or each.is_open
        ]

    def unregister(self, region: AnyRegion) -> None:
        region.is_leaving = True
        self._remove_if_unused(region)

    def take(self, name: str) -> AnyRegion:
        """A region that stays until `give_back`. Raises NotFound."""
        self.require_enabled()
        region = self.find(name)
        if region is None or region.is_leaving:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        region.requests += 1
        return region

    def give_back(self, region: AnyRegion) -> None:
        region.requests -= 1
        self._remove_if_unused(region)

    def _check_name(self, name: str) -> None:
        self.require_enabled()
        if not 1 <= len(name) <= self._limits.name_chars_max:
            raise InvalidArgument(
                f"the name of a shared memory region must have 1 to {self._limits.name_chars_max} "
                f"characters, got {len(name)}"
            )

    def _check_room(self, name: str) -> None:
        if name in self._regions:
            raise AlreadyExists(f"shared memory region '{name}' already in manager")
        if len(self._regions) >= self._limits.regions_max:
            raise ResourceExhausted(
                f"cannot register shared memory region '{name}': there are "
                f"{self._limits.regions_max}, the most that this server allows"
            )

    def _remove_if_unused(self, region: AnyRegion) -> None:
        if region.is_leaving and not region.requests:
            del self._regions[region.name]
            region.close()


@dataclass(frozen=True, slots=True)
class RegionPart(Source):
    """The bytes of one tensor in a region; `offset` counts from the region's beginning."""

    region: Region
    offset: int
    size: int

    def read_into(self, target: memoryview) -> None:
        """Raises InvalidArgument when the region has become too short."""
        count = self.region.file.read(self.region.offset + self.offset, target)
        if count < self.size:
            raise InvalidArgument(self._too_short(count))

    def write(self, output: str, data: Buffer) -> None:
        """Put the elements of an output there.

        Raises InvalidArgument when the region has become too short, ResourceExhausted when the host
        has no memory for it.
        """
        # A write would make the file longer, which its owner has shortened.
        start = self.region.offset + self.offset
        room = self.region.file.size - start
        if room < memoryview(data).nbytes:
            raise InvalidArgument(f"output '{output}': {self._too_short(max(room, 0))}")
        self.region.file.write(start, data)

    def _too_short(self, count: int) -> str:
        return (
            f"shared memory region '{self.region.name}' is shorter than when it was registered: "
            f"expected {self.size} bytes at offset {self.offset}, got {count}"
        )

    def check_room(self, output: str, size: int) -> None:
        """Raises Internal, as Triton has it, when the request allowed an output too few bytes."""
        if size > self.size:
            raise Internal(
                f"shared memory size specified with the request for output '{output}' ({self.size} "
                f"bytes) should be at least {size} bytes to hold the results"
            )


@dataclass(slots=True)
class RequestRegions:
    """What one request uses of the regions, until `end`."""

    registry: RegionRegistry
    targets: dict[str, AnyPart] = field(default_factory=dict)  # by output
    _taken: list[AnyRegion] = field(default_factory=list)

    def part(self, wanted: RegionRange) -> AnyPart:
        """Raises NotFound, and InvalidArgument for what is outside the region."""
        region = self.registry.take(wanted.region)
        self._taken.append(region)
        offset, size = wanted.offset & _SIZE_MAX, wanted.byte_size & _SIZE_MAX
        if offset >= region.size:
            raise InvalidArgument(f"Invalid offset for shared memory region: '{region.name}'")
        if offset + size > _SIZE_MAX:
            raise InvalidArgument(
                f"Integer overflow detected: byte_size ({size}) and offset ({offset}) add up to "
                f"more than {_SIZE_MAX} for shared memory region '{region.name}'"
            )
        if offset + size > region.size:
            raise InvalidArgument(
                f"Invalid offset + byte size for shared memory region: '{region.name}'"
            )
        if isinstance(region, CudaRegion):
            return CudaPart(region, offset, size)
        return RegionPart(region, offset, size)

    @property
    def worker(self) -> str:
        """Who has the device that regions of this request are on; "" where none are.

        Raises InvalidArgument where there are several.
        """
        names = {each.worker.name for each in self._taken if isinstance(each, CudaRegion)}
        if len(names) > 1:
            raise InvalidArgument(
                f"the request refers to shared memory on several devices: {', '.join(names)}"
            )
        return "".join(names)

    async def open_again(self) -> None:
        """Those on devices whose workers were started again. Raises ThirdrailError."""
        for region in self._taken:
            if isinstance(region, CudaRegion):
                await region.open_again()

    def end(self) -> None:
        while self._taken:
            self.registry.give_back(self._taken.pop())
