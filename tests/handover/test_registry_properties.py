# SPDX-License-Identifier: Apache-2.0
"""What holds for the books of exports whatever sessions do, in whatever order.

A plain model keeps who holds what; the registry must agree with it after every step, on what is
charged, what can be read, and what was let go.
"""

from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from thirdrail.errors import FailedPrecondition, NotNow
from thirdrail.v1.tensor_pb2 import ArenaRef
from thirdrail_server.worker.export_life import Export, State

SESSIONS = st.integers(1, 3)
WHICH = st.integers(0, 3)  # of the exports that fit, those that are over at last
MS = 1_000_000


@dataclass(eq=False)
class Held:
    """One export as the model sees it."""

    export: Export
    exporter: int
    importer: int = 0
    is_over: bool = False
    is_revoked: bool = False
    source: "Held | None" = None  # the import that was handed on

    def came_of(self, other: "Held") -> bool:
        return self is other or (self.source is not None and self.source.came_of(other))


class AnyHandOvers(RuleBasedStateMachine):
    books_class: Any

    def __init__(self) -> None:
        super().__init__()
        self.books = self.books_class(
            exports_per_session_max=4, imports_per_session_max=3, exports_total_max=9, hops_max=3
        )
        self.held: list[Held] = []
        self.kept: dict[Any, int] = {}  # memory -> the session that uses it itself
        self.ended: set[int] = set()

    def alive(self, session: int) -> int:
        """Sessions are never numbered twice: one that has ended comes back as another."""
        while session in self.ended:
            session += 3
        return session

    def some(self, which: int, *, taken: bool) -> Held | None:
        """One that was taken or that was not, over or not."""
        fitting = [each for each in self.held if bool(each.importer) == taken]
        fitting.sort(key=lambda each: each.is_over)
        return fitting[min(which, len(fitting) - 1)] if fitting else None

    @rule(session=SESSIONS, life_ms=st.sampled_from([0, 5]), kept=st.booleans())
    def offer(self, session: int, life_ms: int, kept: bool) -> None:
        session, memory = self.alive(session), self.books.memory()
        try:
            export = self.books.offer(session, memory, life_ms=life_ms, is_kept=kept)
        except NotNow:
            assert memory not in self.books.registry
            return
        if kept:
            self.kept[memory] = session
        self.held.append(Held(export, session))

    @rule(which=WHICH)
    def offer_same_memory(self, which: int) -> None:
        ours = list(self.kept.items())
        if which >= len(ours):
            return
        memory, session = ours[which]
        try:
            export = self.books.offer(session, memory, is_kept=True)
        except NotNow:
            return
        self.held.append(Held(export, session))

    @rule(session=SESSIONS, to=SESSIONS, on=st.booleans())
    def hand_over(self, session: int, to: int, on: bool) -> None:
        before = len(self.held)
        self.offer(session, 0, False)
        if len(self.held) > before:
            self.take_offer(self.held[-1], to)
            if on and self.held[-1].importer:
                self.hand_on_import(self.held[-1])

    @rule(which=WHICH)
    def hand_on(self, which: int) -> None:
        source = self.some(which, taken=True)
        if source is not None:
            self.hand_on_import(source)

    def hand_on_import(self, source: Held) -> None:
        session = source.importer
        try:
            export = self.books.offer_again(session, source.export.epoch)
        except (FailedPrecondition, NotNow):
            return
        assert not source.is_over
        assert not source.is_revoked
        self.held.append(Held(export, session, source=source))

    @rule(which=WHICH, session=SESSIONS)
    def take(self, which: int, session: int) -> None:
        held = self.some(which, taken=which == 3)
        if held is not None:
            self.take_offer(held, session)

    def take_offer(self, held: Held, session: int) -> None:
        session = self.alive(session)
        is_good = not held.is_over and not held.importer
        is_late = self.books.now_ns >= held.export.expires_ns
        try:
            taken = self.books.take(session, held.export.token)
        except NotNow:
            assert is_good
        except FailedPrecondition:
            assert is_late or not is_good
            held.is_over |= is_late and not held.importer
        else:
            assert is_good
            assert not is_late
            assert taken is held.export
            held.importer = session

    @rule(which=WHICH, taken=st.booleans(), by=SESSIONS | st.just(0))
    def revoke(self, which: int, taken: bool, by: int) -> None:
        held = self.some(which, taken=taken)
        if held is None:
            return
        by = by or held.exporter
        if by in self.ended:
            return
        told = self.books.registry.revoke(by, held.export.number)
        expected = set()
        if by == held.exporter:
            for each in self.held:
                if each.came_of(held) and not each.is_over and not each.is_revoked:
                    if each.importer:
                        each.is_revoked = True
                        expected.add((each.importer, each.export.epoch))
                    else:
                        each.is_over = True
        assert set(told) == expected

    @rule(which=WHICH, by=SESSIONS | st.just(0))
    def release(self, which: int, by: int) -> None:
        held = self.some(which, taken=True)
        if held is None:
            return
        by = by or held.importer
        self.books.registry.release(by, held.export.epoch)
        held.is_over |= bool(held.importer) and by == held.importer

    @rule(which=WHICH)
    def drop_kept(self, which: int) -> None:
        ours = list(self.kept)
        if which < len(ours):
            del self.kept[ours[which]]
            assert self.books.registry.drop_kept(ours[which])

    @rule(session=SESSIONS, at_once=st.booleans(), really=st.sampled_from([True, False, False]))
    def end(self, session: int, at_once: bool, really: bool) -> None:
        if not really:
            return
        session = self.alive(session)
        if not at_once:
            self.books.registry.end_offers(session)
        else:
            self.ended.add(session)
            self.books.registry.end(session)
        for each in self.held:
            if each.exporter == session and not each.importer:
                each.is_over = True
            if at_once and each.importer == session:
                each.is_over = True
        if at_once:
            self.kept = {memory: by for memory, by in self.kept.items() if by != session}

    @rule(ms=st.sampled_from([1, 1, 5, 60_000]), asks=st.booleans())
    def pass_time(self, ms: int, asks: bool) -> None:
        self.books.now_ns += ms * MS
        if asks:
            self.books.registry.expire(self.books.now_ns)
            for each in self.held:
                if not each.importer and self.books.now_ns >= each.export.expires_ns:
                    each.is_over = True

    @invariant()
    def memory_lives_exactly_as_long_as_somebody_uses_it(self) -> None:
        used = {each.export.memory for each in self.held if not each.is_over} | set(self.kept)
        known = {each.export.memory for each in self.held}
        assert set(self.books.disposed) == known - used
        assert all(memory in self.books.registry for memory in used)

    @invariant()
    def all_of_it_is_charged_to_somebody_who_has_a_part_in_it(self) -> None:
        registry = self.books.registry
        used = {each.export.memory for each in self.held if not each.is_over} | set(self.kept)
        assert registry.total_bytes == sum(map(len, used))
        sessions = {each.exporter for each in self.held} | {each.importer for each in self.held}
        assert sum(registry.charged_bytes(each) for each in sessions) == registry.total_bytes
        assert not any(registry.charged_bytes(each) for each in self.ended)

    @invariant()
    def only_the_importer_reads_and_only_until_it_is_revoked(self) -> None:
        for each in self.held:
            for session in {each.exporter, each.importer, 1, 2} - {0}:
                may = each.importer == session and not each.is_over and not each.is_revoked
                ref = ArenaRef(epoch=each.export.epoch, size=64)
                try:
                    self.books.registry.view(session, "x", ref)
                except FailedPrecondition:
                    assert not may
                else:
                    assert may

    @invariant()
    def states_are_what_happened(self) -> None:
        for each in self.held:
            if each.is_over:
                expected = State.ENDED
            elif each.is_revoked:
                expected = State.REVOKED
            else:
                expected = State.TAKEN if each.importer else State.OFFERED
            assert each.export.state is expected

    def teardown(self) -> None:
        for session in {each.exporter for each in self.held} | {
            each.importer for each in self.held
        }:
            self.books.registry.end(session)
        assert self.books.registry.total_bytes == 0
        assert set(self.books.disposed) == {each.export.memory for each in self.held}


def test_any_hand_overs(new_books: Any) -> None:
    machine = type("Machine", (AnyHandOvers,), {"books_class": new_books})
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=150, stateful_step_count=40, deadline=None, database=None),
    )
