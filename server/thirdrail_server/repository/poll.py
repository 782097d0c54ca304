# SPDX-License-Identifier: Apache-2.0
"""Poll mode's decisions: what to load, reload or unload, given what each poll saw.

A model file is written over seconds. So nothing is done about a folder before two consecutive
polls saw it in the same state; a folder that vanished is a state like any other. Pure: the caller
polls and acts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from thirdrail_server.repository.fingerprint import Fingerprint


@dataclass(frozen=True, slots=True)
class Decision:
    action: Literal["load", "reload", "unload"]
    name: str


@dataclass(slots=True)
class Poller:
    """Feed it one snapshot per poll. `acted_on`: the state that the running models come from.

    A decision is given once: a load that fails is tried again when the folder changes, not at each
    poll. A poll that could not read the repository must not be fed, or it would unload every
    model.
    """

    acted_on: dict[str, Fingerprint]
    _seen: dict[str, Fingerprint] = field(init=False)

    def __post_init__(self) -> None:
        self.acted_on = dict(self.acted_on)
        self._seen = dict(self.acted_on)

    def observe(self, snapshot: Mapping[str, Fingerprint]) -> list[Decision]:
        """What to do now, by name; unloads first, so that their memory is there for the loads."""
        names = sorted(self.acted_on.keys() | snapshot.keys())
        decisions = [
            decision
            for name in names
            if self._seen.get(name) == snapshot.get(name)
            and (decision := self._act(name, snapshot.get(name))) is not None
        ]
        self._seen = dict(snapshot)
        return sorted(decisions, key=lambda decision: decision.action != "unload")

    def _act(self, name: str, now: Fingerprint | None) -> Decision | None:
        before = self.acted_on.get(name)
        if now == before:
            return None
        if now is None:
            del self.acted_on[name]
            return Decision("unload", name)
        self.acted_on[name] = now
        return Decision("load" if before is None else "reload", name)
