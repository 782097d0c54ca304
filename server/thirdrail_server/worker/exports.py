# SPDX-License-Identifier: Apache-2.0
"""Who may read whose tensor: the books of what this worker's clients hand to each other.

Nothing here knows sockets, clocks or file descriptors: time comes in as `now_ns`, and memory is
only carried. The life of one export is in `export_life`, who pays for its memory in
`export_charges`. An importer may export again; who revokes an export revokes what came of it, too.
"""

import itertools
import secrets
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from thirdrail.errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
)
from thirdrail.lane.allocator import ALIGNMENT_BYTES
from thirdrail.v1.tensor_pb2 import ArenaRef
from thirdrail_server.config import ExportLimits
from thirdrail_server.worker.export_charges import Copying, OnCharge, SharedMemories, charge_nobody
from thirdrail_server.worker.export_life import (
    Event,
    Export,
    Party,
    State,
    Tensor,
    Terms,
    next_state,
)
from thirdrail_server.worker.export_offers import TOKEN_BYTES, Offers
from thirdrail_server.worker.tensor_memory import TensorMemory

Lineage = tuple[tuple[int, int], ...]


class Told(NamedTuple):
    """An importer that must hear of a revoke."""

    session: int
    epoch: int


class ExportRegistry:
    """All exports of one worker.

    new_epoch: gives numbers that were never used before in this worker.
    dispose: is given memory that nobody has a use for any more.
    on_charge: hears of every change of who is charged.
    """

    def __init__(
        self,
        limits: ExportLimits,
        *,
        new_epoch: Callable[[], int],
        dispose: Callable[[TensorMemory], None],
        on_charge: OnCharge = charge_nobody,
    ) -> None:
        self._limits = limits
        self._new_epoch = new_epoch
        self._numbers = itertools.count(1)
        self._exports: dict[int, Export] = {}  # by number, without those that have ended
        self._offers = Offers()
        self._imports: dict[int, Export] = {}  # by epoch
        self._memories = SharedMemories(dispose, on_charge)

    # Figures

    @property
    def total_bytes(self) -> int:
        return self._memories.total_bytes

    @property
    def has_offers(self) -> bool:
        return len(self._offers) > 0

    def charged_bytes(self, session: int) -> int:
        return self._memories.charged_bytes(session)

    def export_count(self, session: int) -> int:
        """Offered by a session, or taken from it and not given back."""
        return sum(each.exporter == session for each in self._exports.values())

    def import_count(self, session: int) -> int:
        return sum(each.importer == session for each in self._imports.values())

    # Exporting

    def begin_copy(self, session: int, size: int) -> Copying:
        """Room for a copy that is about to be made. Raises ResourceExhausted at a limit."""
        self._check_room(session, size)
        return self._memories.begin_copy(session, size)

    def end_copy(self, copying: Copying) -> None:
        """It was made or not; who has made it offers it now."""
        self._memories.end_copy(copying)

    def offer(
        self,
        exporter: Party,
        memory: TensorMemory,
        tensor: Tensor,
        terms: Terms,
        now_ns: int,
        *,
        is_kept: bool = False,
    ) -> Export:
        """Offer a tensor to one importer. The same memory may be offered several times.

        is_kept: the exporter uses the memory as an input chunk, until `drop_kept`.
        Raises ResourceExhausted at a limit; new memory is then still the caller's.
        """
        self._check_room(exporter.session, 0 if memory in self._memories else len(memory))
        return self._offer(exporter, memory, is_kept, tensor, (), terms, now_ns)

    def offer_again(
        self, exporter: Party, epoch: int, tensor: Tensor, terms: Terms, now_ns: int
    ) -> Export:
        """Offer what the exporter has imported, all of it. Raises as `offer` and `imported` do, and
        InvalidArgument for a part of it.
        """
        source = self.imported(exporter.session, epoch)
        if tensor.size != source.tensor.size:
            raise InvalidArgument(
                f"an imported tensor is handed on whole: it has {source.tensor.size} bytes, got "
                f"{tensor.size}"
            )
        if len(source.lineage) >= self._limits.hops_max:
            raise ResourceExhausted(
                f"this tensor was handed on {len(source.lineage)} times already, the most allowed"
            )
        self._check_room(exporter.session, 0)
        return self._offer(exporter, source.memory, False, tensor, source.lineage, terms, now_ns)

    def _offer(
        self,
        exporter: Party,
        memory: TensorMemory,
        is_kept: bool,
        tensor: Tensor,
        lineage: Lineage,
        terms: Terms,
        now_ns: int,
    ) -> Export:
        life_ms = min(terms.life_ms or self._limits.life_ms_default, self._limits.life_ms_max)
        export = Export(
            memory,
            tensor,
            exporter.session,
            lineage=(*lineage, (next(self._numbers), exporter.session)),
            importer_uid=exporter.uid if terms.uid is None else terms.uid,
            token=secrets.token_bytes(TOKEN_BYTES),
            expires_ns=now_ns + life_ms * 1_000_000,
        )
        self._exports[export.number] = export
        self._offers.add(export)
        self._memories.add(export, is_kept=is_kept)
        return export

    def _check_room(self, session: int, new_bytes: int) -> None:
        limits = self._limits
        own = self.export_count(session) + self._memories.copies(session)
        if own >= limits.exports_per_session_max:
            raise ResourceExhausted(f"this session shares {own} tensors, the most it may")
        if len(self._exports) >= limits.exports_total_max:
            raise ResourceExhausted(
                f"this worker's clients share {len(self._exports)} tensors, the most they may"
            )
        for whose, held, most in (
            ("this session", self.charged_bytes(session), limits.bytes_per_session_max),
            ("all clients of this worker", self.total_bytes, limits.bytes_total_max),
        ):
            if held + new_bytes > most:
                raise ResourceExhausted(
                    f"{new_bytes} more bytes were to be shared; {held} of the {most} that {whose} "
                    "may share are in use until their importers release them"
                )

    def revoke(self, session: int, number: int) -> list[Told]:
        """Take an export back, and all that came of it. An unknown or ended one changes nothing."""
        told = []
        for export in list(self._exports.values()):
            if (number, session) in export.lineage:
                if export.state is State.TAKEN:
                    told.append(Told(export.importer, export.epoch))
                self._on(export, Event.REVOKE)
        return told

    def drop_kept(self, memory: TensorMemory) -> bool:
        """The exporter has given the input chunk back. False: it is not in these books."""
        if memory not in self._memories:
            return False
        self._memories.drop_kept(memory)
        return True

    def __contains__(self, memory: TensorMemory) -> bool:
        return memory in self._memories

    # Importing

    def take(self, importer: Party, token: bytes, now_ns: int) -> Export:
        """Use a token up.

        Raises FailedPrecondition for one that is no longer good, or never was; PermissionDenied for
        another user's and ResourceExhausted at a limit, which leave the token as it was.
        """
        export = self._offers.find(token)
        if export is None:
            raise FailedPrecondition(
                "this token is not good: it was used before, has expired or was revoked, the one "
                "who exported it has ended, or it is another server's"
            )
        if now_ns >= export.expires_ns:
            self._on(export, Event.EXPIRE)
            raise FailedPrecondition("this token has expired")
        if importer.uid != export.importer_uid:
            raise PermissionDenied(
                f"this tensor is for uid {export.importer_uid}, and the session is of uid "
                f"{importer.uid}"
            )
        held = self.import_count(importer.session)
        if held >= self._limits.imports_per_session_max:
            raise ResourceExhausted(f"this session holds {held} imported tensors, the most it may")
        export.importer, export.epoch = importer.session, self._new_epoch()
        self._imports[export.epoch] = export
        self._on(export, Event.TAKE)
        return export

    def imported(self, session: int, epoch: int, name: str = "to be exported") -> Export:
        """What a session may refer to by an epoch, as tensor `name`. Raises FailedPrecondition."""
        export = self._imports.get(epoch)
        if export is None or export.importer != session:
            raise FailedPrecondition(
                f"tensor '{name}' refers to epoch {epoch}, this session has none such"
            )
        if export.state is State.REVOKED:
            raise FailedPrecondition(
                f"tensor '{name}' was imported and has been revoked by the one who exported it"
            )
        return export

    def view(self, session: int, name: str, ref: ArenaRef) -> npt.NDArray[np.uint8]:
        """The bytes that a request's tensor refers to, read-only; as `arenas.InputArena.view`."""
        export = self.imported(session, ref.epoch, name)
        size = export.tensor.size
        if ref.chunk or ref.offset % ALIGNMENT_BYTES or ref.offset + ref.size > size:
            raise InvalidArgument(
                f"tensor '{name}' refers to bytes {ref.offset} to {ref.offset + ref.size} in chunk "
                f"{ref.chunk} of an imported tensor of {size} bytes in chunk 0; offsets are "
                f"multiples of {ALIGNMENT_BYTES}"
            )
        view = np.frombuffer(export.memory.mapping, np.uint8, ref.size, ref.offset)
        view.flags.writeable = False
        return view

    def release(self, session: int, epoch: int) -> None:
        """An importer gives a tensor back. An unknown epoch is ignored."""
        export = self._imports.get(epoch)
        if export is not None and export.importer == session:
            self._on(export, Event.IMPORTER_LEAVES)

    # Ends

    def expire(self, now_ns: int) -> None:
        """End the offers whose time is over."""
        for export in self._offers:
            if now_ns >= export.expires_ns:
                self._on(export, Event.EXPIRE)

    def end_offers(self, session: int) -> None:
        """A session takes nothing new: nobody can take what it offered any more."""
        for export in self._offers:
            if export.exporter == session:
                self._on(export, Event.EXPORTER_ENDS)

    def end(self, session: int) -> None:
        """A session's process has let go of its memory. What others imported of it stays theirs."""
        self.end_offers(session)
        for export in list(self._imports.values()):
            if export.importer == session:
                self._on(export, Event.IMPORTER_LEAVES)
        for export in self._exports.values():
            if export.exporter == session:
                export.exporter = 0
        self._memories.end(session)

    def _on(self, export: Export, event: Event) -> None:
        before, export.state = export.state, next_state(export.state, event)
        if export.state is before:
            return
        if before is State.OFFERED:
            self._offers.remove(export)
        if export.state is State.ENDED:
            del self._exports[export.number]
            self._imports.pop(export.epoch, None)
        self._memories.on_change(export)
