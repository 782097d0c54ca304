# SPDX-License-Identifier: Apache-2.0
"""Which mechanism shares device memory, and in which order two processes work on it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from thirdrail.errors import InvalidArgument
from thirdrail_engines.cuda.device import Capabilities
from thirdrail_engines.cuda.event_ring import Enqueue, EventRing, Expire, Kind, Reuse, State
from thirdrail_engines.cuda.sharing import How, Peers, choose_sharing, chunk_bytes
from thirdrail_engines.cuda.twin import TWIN_FACTS

ALL = Capabilities(
    has_virtual_memory=True,
    has_posix_fds=True,
    has_memory_pools=True,
    has_pool_posix_fds=True,
    has_ipc_events=True,
)


@pytest.mark.parametrize(
    ("lacks", "peers", "expected"),
    [
        ((), Peers(), How.VIRTUAL_MEMORY),
        (("has_virtual_memory",), Peers(), How.POOL),
        (("has_posix_fds",), Peers(), How.POOL),
        (("has_posix_fds", "has_memory_pools"), Peers(), How.LEGACY),
        (("has_posix_fds", "has_pool_posix_fds"), Peers(), How.LEGACY),
        (("has_posix_fds", "has_memory_pools"), Peers(shares_pids=False), How.HOST),
        ((), Peers(shares_pids=False), How.VIRTUAL_MEMORY),
        (("has_ipc_events",), Peers(), How.HOST),
        ((), Peers(uses_mps=True, is_trusted=False), How.HOST),
        ((), Peers(uses_mps=True), How.VIRTUAL_MEMORY),
        ((), Peers(is_trusted=False), How.VIRTUAL_MEMORY),
    ],
)
def test_the_best_mechanism_that_both_sides_have(
    lacks: tuple[str, ...], peers: Peers, expected: How
) -> None:
    offered = replace(ALL, **dict.fromkeys(lacks, False))
    sharing = choose_sharing(TWIN_FACTS, offered, peers)
    assert sharing.how is expected
    assert [how for how, _ in sharing.refused] == list(How)[: list(How).index(expected)]
    assert all(reason for _, reason in sharing.refused)


def test_some_devices_have_nothing_to_share() -> None:
    integrated = replace(ALL, is_integrated=True)
    assert choose_sharing(TWIN_FACTS, integrated, Peers()).how is How.HOST
    old = choose_sharing(replace(TWIN_FACTS, driver=(11, 1)), ALL, Peers())
    assert old.how is How.HOST
    assert "the driver offers CUDA 11.1, 11.2 is needed" in str(old)


@given(st.integers(0, 1 << 40), st.sampled_from([1 << 12, 1 << 21]))
def test_chunks_are_whole_pages_and_no_larger_than_needed(nbytes: int, page: int) -> None:
    size = chunk_bytes(nbytes, page)
    assert size % page == 0
    assert max(nbytes, 1) <= size < max(nbytes, 1) + page


# The ring

NEVER = dict.fromkeys(Kind, False)


def test_a_call_runs_when_its_inputs_are_ready_and_not_before() -> None:
    ring, done = EventRing(2), dict(NEVER)
    ring.arrive(0, "call", 100)
    assert ring.tick(1, lambda i, kind: done[kind]) == []
    done[Kind.IN_READY] = True
    assert ring.tick(2, lambda i, kind: done[kind]) == [Enqueue(0, "call")]
    assert ring.tick(3, lambda i, kind: done[kind]) == []
    ring.ran(0)
    assert ring.tick(500, lambda i, kind: done[kind]) == []  # its deadline was met
    ring.release(0)
    assert ring.tick(501, lambda i, kind: done[kind]) == []
    done[Kind.CONSUMED] = True
    assert ring.tick(502, lambda i, kind: done[kind]) == []  # the device may write still
    done[Kind.OUT_DONE] = True
    assert ring.tick(503, lambda i, kind: done[kind]) == [Reuse(0)]
    assert not ring.is_quiet


def test_inputs_that_are_never_ready_end_the_call_and_nothing_else() -> None:
    ring = EventRing(2)
    ring.arrive(1, "call", 100)
    wakes = [ring.wake_at_ns]
    assert ring.tick(100, lambda *_: False) == [Expire(1, "call")]
    ring.arrive(1, "next", None)
    assert [*wakes, ring.wake_at_ns] == [100, None]
    assert ring.tick(1000, lambda *_: True) == [Enqueue(1, "next")]


def test_what_a_client_says_wrongly_changes_nothing() -> None:
    ring = EventRing(2)
    ring.arrive(0, "call", None)
    for index in (-1, 2, 0):
        with pytest.raises(InvalidArgument, match=f"a call names place {index}"):
            ring.arrive(index, "other", None)
    for index in (0, 1, 7):
        with pytest.raises(InvalidArgument, match=f"a release names place {index}"):
            ring.release(index)
    assert ring.tick(0, lambda *_: True) == [Enqueue(0, "call")]


def test_the_next_call_waits_in_a_place_that_is_not_free_yet() -> None:
    ring, done = EventRing(1), dict.fromkeys(Kind, True)
    ring.arrive(0, "first", None)
    assert ring.tick(0, lambda i, kind: done[kind]) == [Enqueue(0, "first")]
    ring.dropped(0)
    done[Kind.OUT_DONE] = done[Kind.CONSUMED] = False
    ring.arrive(0, "late", 10)
    with pytest.raises(InvalidArgument, match="another one waits"):
        ring.arrive(0, "more", None)
    assert [ring.wake_at_ns, ring.is_idle] == [10, False]
    assert ring.tick(10, lambda i, kind: done[kind]) == [Expire(0, "late")]
    ring.arrive(0, "second", None)
    assert ring.tick(11, lambda i, kind: done[kind]) == []
    done[Kind.OUT_DONE] = True
    assert ring.tick(12, lambda i, kind: done[kind]) == [Reuse(0), Enqueue(0, "second")]
    assert ring.is_idle


def test_a_session_that_ends_leaves_what_runs_and_drops_what_does_not() -> None:
    ring = EventRing(4)
    for index in range(4):
        ring.arrive(index, index, None)
    ring.tick(0, lambda index, kind: index > 0)
    ring.ran(2)
    ring.ran(3)
    ring.release(3)
    assert ring.end() == [0]
    quiet = [ring.is_quiet]
    # The answers of 2 and 3 may have gone out before the device was done with them.
    assert ring.tick(1, lambda *_: False) == []
    late = [Reuse(1), Reuse(2), Reuse(3)]
    assert ring.tick(2, lambda i, kind: kind is Kind.OUT_DONE) == late
    assert [*quiet, ring.is_quiet] == [False, True]
    with pytest.raises(InvalidArgument, match="the session is over"):
        ring.arrive(0, "late", None)


class AnyOrder(RuleBasedStateMachine):
    """A client that says anything at any time, and events that are done at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = EventRing(3)
        self.now = 0
        self.next_call = 0
        self.done: set[tuple[int, Kind]] = set()
        self.alive: dict[int, int] = {}  # call -> its place: neither run nor ended
        self.running: dict[int, int] = {}
        self.ended: list[int] = []
        self.dropped: set[int] = set()  # places whose results nobody reads
        self.is_over = False

    @rule(index=st.integers(-1, 3), wait=st.one_of(st.none(), st.integers(0, 5)))
    def arrive(self, index: int, wait: int | None) -> None:
        state = self.ring.state(index) if 0 <= index < 3 else None
        is_taken = index in self.alive.values()
        is_free = not self.is_over and not is_taken and state in (State.FREE, State.RELEASED)
        try:
            self.ring.arrive(index, self.next_call, None if wait is None else self.now + wait)
        except InvalidArgument:
            assert not is_free
            return
        assert is_free
        self.done.discard((index, Kind.IN_READY))  # recorded anew
        self.alive[self.next_call] = index
        self.next_call += 1

    @rule(index=st.integers(0, 2), kind=st.sampled_from(Kind))
    def event_is_done(self, index: int, kind: Kind) -> None:
        self.done.add((index, kind))

    @rule(index=st.integers(-1, 3))
    def release(self, index: int) -> None:
        try:
            self.ring.release(index)
        except InvalidArgument:
            return
        assert self.ring.state(index) is State.RELEASED
        self.done.discard((index, Kind.CONSUMED))

    @rule(index=st.integers(0, 2), has_results=st.booleans())
    def answer(self, index: int, has_results: bool) -> None:
        if self.ring.state(index) is State.RUNNING and index in self.running.values():
            self.done.discard((index, Kind.OUT_DONE))
            if has_results:
                return self.ring.ran(index)
            self.dropped.add(index)
            self.ring.dropped(index)

    @rule(index=st.integers(0, 2))
    def cancel(self, index: int) -> None:
        call = self.ring.cancel(index)
        if call is not None:
            assert isinstance(call, int)
            assert self.alive.pop(call) == index
            self.ended.append(call)

    @precondition(lambda self: not self.is_over)
    @rule()
    def end(self) -> None:
        self.is_over = True
        for call in self.ring.end():
            assert isinstance(call, int)
            del self.alive[call]
            self.ended.append(call)
        assert not self.alive

    @rule(step=st.integers(0, 3))
    def tick(self, step: int) -> None:
        self.now += step
        asked: set[tuple[int, Kind]] = set()

        def is_done(index: int, kind: Kind) -> bool:
            asked.add((index, kind))
            return (index, kind) in self.done

        for action in self.ring.tick(self.now, is_done):
            if isinstance(action, Enqueue):
                assert (action.index, Kind.IN_READY) in self.done, "a stream would wait for it"
                assert isinstance(action.call, int)
                assert self.alive.pop(action.call) == action.index
                self.running[action.call] = action.index
            elif isinstance(action, Expire):
                assert isinstance(action.call, int)
                assert self.alive.pop(action.call) == action.index
                self.ended.append(action.call)
            else:
                assert (action.index, Kind.OUT_DONE) in self.done, "the device writes there"
                is_read = action.index in self.dropped or (action.index, Kind.CONSUMED) in self.done
                assert self.is_over or is_read
                self.dropped.discard(action.index)
                self.running = {c: i for c, i in self.running.items() if i != action.index}
        assert asked <= {(index, kind) for index in range(3) for kind in Kind}

    @invariant()
    def every_call_is_in_one_place(self) -> None:
        assert len(set(self.ended)) == len(self.ended)
        assert not set(self.ended) & (self.alive.keys() | self.running.keys())
        for call, index in self.alive.items():
            assert self.ring.state(index) in (State.PENDING, State.RELEASED), call
        if self.ring.is_quiet:
            assert self.is_over
            assert not self.alive


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
