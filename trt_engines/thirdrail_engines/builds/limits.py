# SPDX-License-Identifier: Apache-2.0
"""What a build may take of the host."""

from dataclasses import dataclass

_NICENESS_MAX = 19


@dataclass(frozen=True, slots=True)
class BuildLimits:
    """Raises ValueError for a limit that is none.

    seconds_max: for one build, from the start of its process; waiting for a turn does not count.
    memory_bytes_max: for the process and all that it starts; files that it has mapped do not count,
        since the system can drop them. 0: no limit.
    niceness: 1 to 18 is the CPU priority of that name, which keeps a share of a busy core. 19: the
        build gets only what nobody else wants, and may starve on a host that is always busy.
    builds_at_once_max: in this process, counted over all calls.
    """

    seconds_max: float = 1800.0
    memory_bytes_max: int = 0
    niceness: int = _NICENESS_MAX
    builds_at_once_max: int = 1

    def __post_init__(self) -> None:
        if not self.seconds_max > 0:
            raise ValueError(f"seconds_max is {self.seconds_max}, expected more than 0")
        if self.memory_bytes_max < 0:
            raise ValueError(
                f"memory_bytes_max is {self.memory_bytes_max}, expected at least 0 (0: no limit)"
            )
        if not 0 <= self.niceness <= _NICENESS_MAX:
            raise ValueError(f"niceness is {self.niceness}, expected 0 to {_NICENESS_MAX}")
        if self.builds_at_once_max < 1:
            raise ValueError(
                f"builds_at_once_max is {self.builds_at_once_max}, expected at least 1"
            )
