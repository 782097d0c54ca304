# SPDX-License-Identifier: Apache-2.0
"""Which devices a server runs models on, and what that makes of its configuration for each."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from thirdrail_engines.cuda.discovery import discover, has_driver
from thirdrail_engines.cuda.identity import DeviceFacts, choose_device
from thirdrail_engines.plans import BuildError
from thirdrail_server.config import ConfigError, MemoryBudget, ServerConfig, WorkerConfig
from thirdrail_server.repository.device_choice import CPU, Device

NUMBER_DIGITS_MAX = 3  # more are the beginning of a UUID

_log = logging.getLogger(__name__)


def find_devices(config: ServerConfig) -> tuple[Device, ...]:
    """The GPUs in the order of their numbers, and the CPU. Blocks: a driver takes its time.

    Raises ConfigError for a GPU that is wanted and not here.
    """
    if config.devices == ():
        return (CPU,)
    found, why_none = discover()
    if not found and has_driver():
        _log.warning("models run on the CPU alone: %s", why_none)
    devices = (*chosen_gpus(config.devices, found, why_none), CPU)
    for number, each in enumerate(devices[:-1]):
        _log.info("GPU %d is %s", number, each)
    return devices


def chosen_gpus(
    wanted: Sequence[str] | None, found: Sequence[DeviceFacts], why_none: str
) -> tuple[Device, ...]:
    """wanted: UUIDs, their unique beginnings, or numbers in `found`; None: all.

    why_none: what `found` is empty for. Raises ConfigError, with what there is to choose from.
    """
    facts = found if wanted is None else [_named(name, found, why_none) for name in wanted]
    for each in facts:
        if list(facts).count(each) > 1:
            raise ConfigError(f"--devices names {each.uuid} twice")
    return tuple(Device(each.uuid, each.name) for each in facts)


def _named(name: str, found: Sequence[DeviceFacts], why_none: str) -> DeviceFacts:
    if not found:
        raise ConfigError(f"--devices names {name[:80]!a}, but {why_none}")
    if len(name) <= NUMBER_DIGITS_MAX and name.isascii() and name.isdecimal():
        if int(name) < len(found):
            return found[int(name)]
        there = ", ".join(f"{n} is {each.uuid} ({each.name})" for n, each in enumerate(found))
        raise ConfigError(f"--devices names GPU {name}, which this host does not have: {there}")
    try:
        return choose_device(name, found)
    except BuildError as error:
        raise ConfigError(f"--devices: {error}") from None


def worker_config(config: ServerConfig, device: Device) -> WorkerConfig:
    """Of the worker for a device."""
    is_weighing = bool(memory_budget(config, device).bytes_max)
    # One load after the other, so that each can be weighed.
    loads_at_once_max = 1 if is_weighing else config.worker.loads_at_once_max
    return replace(
        config.worker,
        name=device.worker,
        device=device.uuid,
        loads_at_once_max=loads_at_once_max,
    )


def worker_environment(device: Device, ours: Mapping[str, str]) -> dict[str, str]:
    """A worker sees its own device and no other, whatever library looks for one."""
    return {**ours, "CUDA_VISIBLE_DEVICES": device.uuid}


def memory_budget(config: ServerConfig, device: Device) -> MemoryBudget:
    """`bytes_max` is that of the device's worker."""
    if not device.uuid:
        return config.memory
    return replace(config.memory, bytes_max=config.memory.device_bytes_max)
