# SPDX-License-Identifier: Apache-2.0
"""`instance_group` -> the devices that a model's instances run on. Pure.

A device is who its UUID says, whatever its number is today: numbers change with
CUDA_VISIBLE_DEVICES, with a driver's update and with a board that fell out. A configuration names
GPUs by number all the same, as Triton's do; the numbers are those of the driver's list at the start
of the server, and are turned into UUIDs here, once.

As in Triton, a group's `count` is per GPU, a group that lists no GPUs means all of them, and
KIND_AUTO means GPUs where there are any. KIND_MODEL leaves it to us: KIND_AUTO.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from thirdrail_server.inference.grpc_service_pb2 import ModelConfig, ModelInstanceGroup
from thirdrail_server.repository.errors import RepositoryError

KINDS = ModelInstanceGroup


@dataclass(frozen=True, slots=True)
class Device:
    """What one worker runs models on."""

    uuid: str  # of a GPU, as nvidia-smi writes it; empty: the CPU
    name: str = field(default="", compare=False)  # for people, e.g. "NVIDIA H100 80GB HBM3"

    @property
    def worker(self) -> str:
        """The name of its worker."""
        return f"cuda:{self.uuid}" if self.uuid else "cpu"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.uuid))) or "the CPU"


CPU = Device("")


def devices_of(config: ModelConfig | None, gpus: Sequence[Device]) -> dict[Device, int]:
    """Device -> instances, in the order in which the configuration comes to them.

    gpus: by number. Raises RepositoryError for a group that this host cannot have.
    """
    groups = config.instance_group if config is not None else ()
    instances: dict[Device, int] = {}
    for index, group in enumerate(groups or (ModelInstanceGroup(),)):
        place = f"instance_group[{index}]"
        if group.count < 0:
            raise RepositoryError(f"{place} has count {group.count}, expected 1 or more")
        for device in _of_group(place, group, gpus):
            instances[device] = instances.get(device, 0) + (group.count or 1)
    return instances


def _of_group(place: str, group: ModelInstanceGroup, gpus: Sequence[Device]) -> Iterable[Device]:
    wants_cpu = group.kind == KINDS.KIND_CPU
    if wants_cpu and group.gpus:
        raise RepositoryError(f"{place} is KIND_CPU and lists gpus {list(group.gpus)}: choose one")
    if wants_cpu or (not gpus and group.kind != KINDS.KIND_GPU and not group.gpus):
        return (CPU,)
    if not gpus:
        asks = "is KIND_GPU" if group.kind == KINDS.KIND_GPU else f"lists gpus {list(group.gpus)}"
        raise RepositoryError(f"{place} {asks}, but this host has no GPU; use KIND_CPU")
    return [_numbered(place, number, gpus) for number in _once(place, group.gpus)] or gpus


def _once(place: str, numbers: Sequence[int]) -> Sequence[int]:
    twice = sorted({number for number in numbers if list(numbers).count(number) > 1})
    if twice:
        raise RepositoryError(f"{place} lists GPU {twice[0]} twice; `count` makes more instances")
    return numbers


def _numbered(place: str, number: int, gpus: Sequence[Device]) -> Device:
    if 0 <= number < len(gpus):
        return gpus[number]
    known = ", ".join(f"{index} is {gpu}" for index, gpu in enumerate(gpus))
    raise RepositoryError(f"{place} lists GPU {number}, which this host does not have: {known}")
