# SPDX-License-Identifier: Apache-2.0
"""What a model's configuration says about its queue: batch sizes, waits, bounds and priorities."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from thirdrail import errors

TimeoutAction = Literal["reject", "delay"]

PRIORITY_LEVELS_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelPolicy:
    """The rules of one priority. Raises ValueError when built with impossible values."""

    requests_max: int  # that may wait at this priority; the next one is refused
    timeout_us_default: int = 0  # longest wait; 0: no limit
    allow_timeout_override: bool = False  # a request may ask for a shorter wait
    timeout_action: TimeoutAction = "reject"  # or "delay": kept, but behind the punctual ones

    def __post_init__(self) -> None:
        _require(self.requests_max >= 1, "requests_max", self.requests_max, "1 or more")
        _require(
            self.timeout_us_default >= 0, "timeout_us_default", self.timeout_us_default, "0 or more"
        )
        actions = get_args(TimeoutAction)
        _require(
            self.timeout_action in actions,
            "timeout_action",
            self.timeout_action,
            f"one of {actions}",
        )

    def wait_us(self, requested_us: int) -> int:
        """The longest wait in the queue, 0 for no limit, of a request that asks for `requested_us`.

        A request can shorten its wait where the policy allows that, but never lengthen it.
        """
        if requested_us == 0 or not self.allow_timeout_override:
            return self.timeout_us_default
        if self.timeout_us_default == 0:
            return requested_us
        return min(requested_us, self.timeout_us_default)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePolicy(LevelPolicy):
    """The rules of a model's queue. Raises ValueError when built with impossible values.

    What it inherits from LevelPolicy holds for every priority that has no entry in `overrides`; an
    entry replaces all of it. `requests_max` counts per priority, so that a flood of unimportant
    requests cannot keep the important ones out.
    """

    rows_max: int = 0  # rows in a batch; 0: the model does not batch, each request runs alone
    preferred_rows: tuple[int, ...] = ()  # batch sizes to aim for; none: rows_max
    delay_us_max: int = 0  # how long a request may wait for company while an instance is free
    priority_levels: int = 0  # 1 is the highest; 0: the model has no priorities
    default_priority: int = 0  # 1 to priority_levels; 0 where there are none
    overrides: Mapping[int, LevelPolicy] = field(default_factory=dict)  # by priority

    def __post_init__(self) -> None:
        LevelPolicy.__post_init__(self)
        _require(self.rows_max >= 0, "rows_max", self.rows_max, "0 or more")
        _require(
            all(1 <= rows <= self.rows_max for rows in self.preferred_rows),
            "preferred_rows",
            self.preferred_rows,
            f"sizes from 1 to rows_max, which is {self.rows_max}",
        )
        _require(self.delay_us_max >= 0, "delay_us_max", self.delay_us_max, "0 or more")
        self._check_priorities()

    def _check_priorities(self) -> None:
        levels = self.priority_levels
        _require(
            0 <= levels <= PRIORITY_LEVELS_MAX,
            "priority_levels",
            levels,
            f"0 to {PRIORITY_LEVELS_MAX}",
        )
        _require(
            min(levels, 1) <= self.default_priority <= levels,
            "default_priority",
            self.default_priority,
            f"1 to priority_levels, which is {levels}" if levels else "0 without priority_levels",
        )
        _require(
            all(1 <= priority <= levels for priority in self.overrides),
            "overrides",
            sorted(self.overrides),
            f"priorities from 1 to priority_levels, which is {levels}",
        )

    def of(self, priority: int) -> LevelPolicy:
        """The rules for a priority that `resolve_priority` gave."""
        return self.overrides.get(priority, self)

    def resolve_priority(self, requested: int) -> int:
        """The priority that a request gets: its own, or the model's default for 0.

        In a model without priorities all requests are equal, whatever they ask for: the number has
        nothing to mean there, and some clients send the same one to all their models.
        Raises InvalidArgument for a priority that the model does not have.
        """
        levels = self.priority_levels
        if requested == 0 or levels == 0:
            return self.default_priority
        if 1 <= requested <= levels:
            return requested
        raise errors.InvalidArgument(
            f"the request's priority is {requested}, expected 1 (highest) to {levels}, "
            f"or 0 for the model's default of {self.default_priority}"
        )


def _require(is_good: bool, name: str, value: object, expected: str) -> None:
    if not is_good:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
