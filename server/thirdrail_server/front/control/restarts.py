# SPDX-License-Identifier: Apache-2.0
"""Decides what follows a worker's death: when the next starts, and whose fault it was. Pure code.

A model whose load was under way when the worker died is a suspect. One suspect alone is the
culprit: it is not loaded again until it changes or somebody asks for it, so a poison model costs
one restart, not an endless row of them. Of several, each is tried again with no other load beside
it, so that the next death names one. A load that waits for a build, which another process does, is
no suspect, nor is one that waits for room.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

MS = 1_000_000
S = 1_000_000_000


@dataclass(slots=True)
class RestartDelay:
    """Exponential back-off: each death in a row doubles the delay, a long life forgets them."""

    delay_ms_min: int
    delay_ms_max: int
    stable_s: int
    _next_ms: int = 0
    _started_ns: int | None = None

    def on_start(self, now_ns: int) -> None:
        self._started_ns = now_ns

    def on_death(self, now_ns: int) -> int:
        """How long to wait before the next start, in nanoseconds."""
        was_stable = self._started_ns is not None and now_ns - self._started_ns >= self.stable_s * S
        self._started_ns = None
        if was_stable or self._next_ms == 0:
            self._next_ms = self.delay_ms_min
        delay_ms = self._next_ms
        self._next_ms = min(2 * delay_ms, self.delay_ms_max)
        return delay_ms * MS


class Verdict(Enum):
    """What becomes of a load that a worker's death cut off."""

    BROKEN = "it alone was being loaded: it killed the worker"
    RETRY_ALONE = "others were being loaded too: try again with none beside it"
    RETRY = "it was being built, in another process, or had not begun: try again"


Source = TypeVar("Source")


@dataclass(frozen=True, slots=True)
class Aftermath(Generic[Source]):
    """What a death means for the models."""

    lost: list[tuple[str, Source]]  # they served: load them again, in this order
    retried: frozenset[str]  # suspects whose load will be tried again, by whoever began it


@dataclass(slots=True)
class LoadLedger(Generic[Source]):
    """Which loads are under way; which models serve, from what, in the order of their loads."""

    _loading: set[str] = field(default_factory=set)
    _building: set[str] = field(default_factory=set)  # of these, those that wait for a build
    _serving: dict[str, Source] = field(default_factory=dict)
    _verdicts: dict[str, Verdict] = field(default_factory=dict)

    def begin(self, name: str) -> None:
        assert name not in self._loading, "loads of one model are done one after the other"
        self._loading.add(name)
        self._verdicts.pop(name, None)

    def note(self, name: str, *, is_building: bool) -> None:
        """Whether a load waits for another process at the moment."""
        if is_building and name in self._loading:
            self._building.add(name)
        else:
            self._building.discard(name)

    def succeed(self, name: str, source: Source) -> Source | None:
        """The model serves from `source` now. Returns what it served from before."""
        self.fail(name)
        before = self._serving.get(name)
        self._serving[name] = source
        return before

    def fail(self, name: str) -> None:
        """The load is over. What served goes on serving."""
        self._loading.discard(name)
        self._building.discard(name)

    def source_of(self, name: str) -> Source | None:
        """What the model serves from."""
        return self._serving.get(name)

    def forget(self, name: str) -> Source | None:
        """The model was unloaded, and does not come back by itself. Returns what it served from."""
        return self._serving.pop(name, None)

    def on_death(self) -> Aftermath[Source]:
        """The worker died, and with it all that it served and was loading."""
        loading, self._loading = frozenset(self._loading), set()
        building, self._building = frozenset(self._building), set()
        suspects = loading - building
        verdict = Verdict.BROKEN if len(suspects) == 1 else Verdict.RETRY_ALONE
        self._verdicts.update(dict.fromkeys(suspects, verdict))
        self._verdicts.update(dict.fromkeys(building, Verdict.RETRY))
        lost, self._serving = self._serving, {}
        # A suspect that served before would, from now on, be loaded from what killed the worker.
        again = [(name, source) for name, source in lost.items() if name not in loading]
        return Aftermath(again, loading if verdict is Verdict.RETRY_ALONE else building)

    def verdict(self, name: str) -> Verdict:
        """About a load that failed because the worker died."""
        return self._verdicts.pop(name, Verdict.RETRY)
