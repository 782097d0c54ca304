# SPDX-License-Identifier: Apache-2.0
"""The books of all sessions' arena memory: kept by any thread, acted upon on the loop."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from thirdrail.errors import ResourceExhausted
from thirdrail_server.config import SessionLimits
from thirdrail_server.worker.quotas import Evicted, Granted, Holder, Refused, decide


class MakingRoom(ResourceExhausted):
    """There is no memory, but some is on its way back."""


class Owner(Protocol):
    """A session; its text is its name."""

    number: int

    @property
    def uid(self) -> int: ...

    def goodbye(self, error: ResourceExhausted) -> None: ...


@dataclass(slots=True, eq=False)
class Account:
    """One session's memory in the books."""

    ledger: "ArenaLedger"
    owner: Owner
    size: int = 0  # bytes
    has_ended: bool = False

    def charge(self, size: int, /, *, is_spare: bool = False) -> None:
        """See chunks.Charge; less never fails. Raises MakingRoom, ResourceExhausted. Any thread."""
        self.ledger.charge(self, size, is_spare=is_spare)

    def take_over(self, size: int) -> None:
        """Take bytes that another account had until now, or give such back. Never fails."""
        self.ledger.move(self, size)

    def end(self) -> None:
        """The session takes nothing new; its memory is on its way back."""
        self.has_ended = True

    def close(self) -> None:
        """Its memory is back."""
        self.ledger.close(self)

    def holder(self) -> Holder:
        owner = self.owner
        return Holder(owner.number, owner.uid, self.size, self.has_ended, str(owner))


class ArenaLedger:
    """Lives on a loop."""

    def __init__(self, limits: SessionLimits) -> None:
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._accounts: list[Account] = []
        self.changes = 0  # how often memory came back
        self._changed: asyncio.Future[None] | None = None

    def open(self, owner: Owner) -> Account:
        account = Account(self, owner)
        with self._lock:
            self._accounts.append(account)
        return account

    def charge(self, account: Account, size: int, *, is_spare: bool) -> None:
        if size <= 0:
            with self._lock:
                account.size += size
            self._on_loop(self._note_change)
            return
        with self._lock:
            needy = account.holder()
            holders = [needy if each is account else each.holder() for each in self._accounts]
            decision = decide(needy, size, holders, self._limits)
            if isinstance(decision, Granted):
                account.size += size
                return
            if isinstance(decision, Evicted) and not is_spare:
                self._evict(decision)
        if isinstance(decision, Refused):
            raise ResourceExhausted(decision.text)
        raise MakingRoom(decision.text)

    def move(self, account: Account, size: int) -> None:
        with self._lock:
            account.size += size
        if size < 0:
            self._on_loop(self._note_change)

    def _evict(self, decision: Evicted) -> None:
        (victim,) = [each for each in self._accounts if each.owner.number == decision.victim]
        victim.has_ended = True  # from now on, so that nobody else ends for the same memory
        error = ResourceExhausted(decision.goodbye)
        self._on_loop(lambda: victim.owner.goodbye(error))

    def _on_loop(self, act: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended, and all sessions with it
            self._loop.call_soon_threadsafe(act)

    def close(self, account: Account) -> None:
        with self._lock:
            self._accounts.remove(account)
        self._note_change()

    async def wait_for_change(self, seen: int) -> None:
        """Until memory has come back since `changes` was `seen`."""
        if self.changes == seen:
            if self._changed is None:
                self._changed = self._loop.create_future()
            await asyncio.shield(self._changed)

    def _note_change(self) -> None:
        self.changes += 1
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None
