# SPDX-License-Identifier: Apache-2.0
"""The memory that exports show: who has a use for it, and who is charged for it.

It is charged to the session that made it while that one has a use for it, else to whoever has held
it for longest; it is let go when nobody has a use for it any more.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from thirdrail_server.worker.export_life import Export, State
from thirdrail_server.worker.tensor_memory import TensorMemory


@dataclass(slots=True, eq=False)
class _Shared:
    memory: TensorMemory
    maker: int  # a session; 0: it has ended
    is_kept: bool  # the maker uses it as an input chunk, too
    exports: list[Export] = field(default_factory=list)  # that have not ended, oldest first
    payer: int = 0  # a session; 0: nobody


def _payer_of(shared: _Shared) -> int:
    """A revoke ends the exporter's use, and not the importer's, who has the memory mapped."""
    if shared.is_kept:
        return shared.maker
    if not shared.exports:
        return 0
    if shared.maker and any(
        each.exporter == shared.maker and each.state is not State.REVOKED for each in shared.exports
    ):
        return shared.maker
    oldest = shared.exports[0]
    return oldest.exporter if oldest.state is State.OFFERED else oldest.importer


@dataclass(frozen=True, slots=True)
class Copying:
    """A copy for an export that is being made, counted already."""

    session: int
    size: int


class OnCharge(Protocol):
    def __call__(self, session: int, size: int, /, *, is_new: bool) -> None:
        """A session is charged so many bytes more, or less.

        is_new: nobody was charged for them before; only then it may raise ResourceExhausted.
        """


def charge_nobody(session: int, size: int, /, *, is_new: bool) -> None:
    """For books that nobody else looks at."""


class SharedMemories:
    """dispose: is given memory that nobody has a use for any more.
    on_charge: hears of every change of who is charged.
    """

    def __init__(
        self, dispose: Callable[[TensorMemory], None], on_charge: OnCharge = charge_nobody
    ) -> None:
        self._dispose = dispose
        self._on_charge = on_charge
        self._shared: dict[TensorMemory, _Shared] = {}
        self._charged: Counter[int] = Counter()  # bytes by session
        self._copying: list[Copying] = []

    def __contains__(self, memory: TensorMemory) -> bool:
        return memory in self._shared

    @property
    def total_bytes(self) -> int:
        return self._charged.total()

    def charged_bytes(self, session: int) -> int:
        return self._charged[session]

    def copies(self, session: int) -> int:
        """How many are being made for it."""
        return sum(each.session == session for each in self._copying)

    def begin_copy(self, session: int, size: int) -> Copying:
        self._charge(session, size, is_new=True)
        self._copying.append(Copying(session, size))
        return self._copying[-1]

    def end_copy(self, copying: Copying) -> None:
        self._copying.remove(copying)
        self._charge(copying.session, -copying.size)

    def add(self, export: Export, *, is_kept: bool) -> None:
        """An export of new memory, or one more of known memory."""
        shared = self._shared.get(export.memory)
        if shared is None:
            shared = _Shared(export.memory, export.exporter, is_kept)
            self._shared[export.memory] = shared
        shared.exports.append(export)
        self._settle(shared)

    def on_change(self, export: Export) -> None:
        """An export has another state."""
        shared = self._shared[export.memory]
        if export.state is State.ENDED:
            shared.exports.remove(export)
        self._settle(shared)

    def drop_kept(self, memory: TensorMemory) -> None:
        """The maker does not use it itself any more."""
        self._shared[memory].is_kept = False
        self._settle(self._shared[memory])

    def end(self, session: int) -> None:
        """A session has no use for anything any more; its exports know already."""
        for shared in list(self._shared.values()):
            if shared.maker == session:
                shared.maker, shared.is_kept = 0, False
                self._settle(shared)

    def _settle(self, shared: _Shared) -> None:
        payer, size = _payer_of(shared), len(shared.memory)
        if payer != shared.payer:
            self._charge(shared.payer, -size)
            self._charge(payer, size)
            shared.payer = payer
        if not shared.is_kept and not shared.exports:
            del self._shared[shared.memory]
            self._dispose(shared.memory)

    def _charge(self, session: int, size: int, *, is_new: bool = False) -> None:
        if session:
            self._on_charge(session, size, is_new=is_new)
            self._charged[session] += size
            if not self._charged[session]:
                del self._charged[session]
