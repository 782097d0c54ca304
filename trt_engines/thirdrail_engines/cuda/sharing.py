# SPDX-License-Identifier: Apache-2.0
"""How device memory is shared with a client's process: which mechanism, and why not the others.

Pure code. The server owns the memory in every case. In order of preference: virtual memory
exported as a file descriptor (one descriptor is one allocation, in any order of freeing), a memory
pool of the session's own, the legacy handles, and where none will do, host memory, which always
works. Not yet run on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from thirdrail_engines.cuda.device import Capabilities
from thirdrail_engines.cuda.identity import DeviceFacts

# Creating events for other processes could deadlock in drivers before this one's CUDA version.
DRIVER_MIN = (11, 2)


class How(StrEnum):
    VIRTUAL_MEMORY = "virtual memory, as file descriptors"
    POOL = "a memory pool, as a file descriptor"
    LEGACY = "legacy CUDA IPC handles"
    HOST = "host memory"


@dataclass(frozen=True, slots=True)
class Peers:
    """What is known of the two processes.

    uses_mps: faults of one client reach the others. is_trusted: the client's user is the server's,
    or one that the configuration names. shares_pids: both are in one pid namespace.
    """

    uses_mps: bool = False
    is_trusted: bool = True
    shares_pids: bool = True


@dataclass(frozen=True, slots=True)
class Sharing:
    """refused: what would have been preferred, each with the reason."""

    how: How
    refused: tuple[tuple[How, str], ...] = ()

    def __str__(self) -> str:
        return "; ".join([str(self.how), *(f"not {how}: {reason}" for how, reason in self.refused)])


def choose_sharing(facts: DeviceFacts, offered: Capabilities, peers: Peers) -> Sharing:
    refused: list[tuple[How, str]] = []
    of_all = _why_not_at_all(facts, offered, peers)
    for how, why_not in _MECHANISMS:
        reason = of_all or why_not(offered, peers)
        if not reason:
            return Sharing(how, tuple(refused))
        refused.append((how, reason))
    return Sharing(How.HOST, tuple(refused))


def chunk_bytes(nbytes: int, granularity_bytes: int) -> int:
    """What an allocation of at least `nbytes` takes: a multiple of what the driver maps at once,
    2 MiB on today's GPUs."""
    return -(-max(nbytes, 1) // granularity_bytes) * granularity_bytes


def _why_not_at_all(facts: DeviceFacts, offered: Capabilities, peers: Peers) -> str:
    if offered.is_integrated:
        return "the device shares the host's memory, there is nothing to gain"
    if facts.driver < DRIVER_MIN:
        return f"the driver offers CUDA {_text(facts.driver)}, {_text(DRIVER_MIN)} is needed"
    if not offered.has_ipc_events:
        return "the device has no events that two processes share, and without them no order"
    if peers.uses_mps and not peers.is_trusted:
        return (
            "under MPS a fault of this client would reach the others, and its user is not trusted"
        )
    return ""


def _why_not_virtual_memory(offered: Capabilities, peers: Peers) -> str:
    if not offered.has_virtual_memory:
        return "the device has no virtual memory management"
    return "" if offered.has_posix_fds else "its memory cannot be exported as a file descriptor"


def _why_not_pool(offered: Capabilities, peers: Peers) -> str:
    if not offered.has_memory_pools:
        return "the device has no memory pools"
    return "" if offered.has_pool_posix_fds else "its pools cannot be exported"


def _why_not_legacy(offered: Capabilities, peers: Peers) -> str:
    return "" if peers.shares_pids else "the two processes do not see each other's pids"


_WhyNot = Callable[[Capabilities, Peers], str]
_MECHANISMS: tuple[tuple[How, _WhyNot], ...] = (
    (How.VIRTUAL_MEMORY, _why_not_virtual_memory),
    (How.POOL, _why_not_pool),
    (How.LEGACY, _why_not_legacy),
)


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
