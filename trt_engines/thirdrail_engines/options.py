# SPDX-License-Identifier: Apache-2.0
"""What a server decides about an engine before it is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """threads_max: the most threads that one run uses, its calling thread among them.
    instances: how many executions an engine on a device keeps memory for.

    Raises ValueError when a number is not positive.
    """

    threads_max: int = 1
    instances: int = 1

    def __post_init__(self) -> None:
        for name in ("threads_max", "instances"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


def threads_per_run(cores: int, instances: int) -> int:
    """The `threads_max` with which `instances` simultaneous runs of one engine just fill `cores`.

    All runs of an engine share one pool of `threads_max - 1` threads, and each brings its own
    calling thread. So `cores - instances` pool threads make `cores` busy threads when every
    instance runs, and a run that is alone still gets most of the cores. With as many instances as
    cores, each keeps to its own thread.
    """
    return max(1, cores - max(1, instances) + 1)
