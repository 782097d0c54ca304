# SPDX-License-Identifier: Apache-2.0
"""Which waiting requests run next, and together with whom: the queue of one model version.

Three rules, in this order, say who is served:

1. **Rank.** A lower priority number goes first. A request that overstayed its wait where the policy
   says "delay" goes behind the punctual ones of its priority, but before the next priority.
2. **Turns.** Within a rank the flows (the callers' sessions) take turns, one request each, however
   many each of them has waiting. A flow whose first request is taken goes to the end of the line. A
   flow whose first request is passed over keeps its place, whatever else of it is taken.
3. **Deadline.** Within a flow the nearest deadline goes first, then the earliest arrival.

Together they give one order over everything that waits. A batch is read off it: the first request
whose group may go now leads, and others of its group join in order while they fit. A **group** is
all requests of one signature; they alone may share a batch. One that does not fit is passed over in
favour of smaller ones behind it, at most PASSED_OVER_MAX times in a batch. Nobody starves by that:
those passed over move forward whenever somebody ahead of them leads, until they lead themselves and
the others have to fit around them.

A group may go when
- it fills a batch: the largest preferred size is reached, or the next request would exceed it;
- or it can be cut at exactly a preferred size, of which the largest is taken;
- or it is due: one of its members waited for `delay_us_max`; or would miss its deadline by waiting
  longer, given how long runs take at present; or is more urgent than the default priority, since
  that means not to wait for company. Where there is a delay to wait for, a group that is due leaves
  with up to `rows_max` rows, whatever sizes are preferred.
Nothing waits for company while all instances are busy: batches grow then by themselves.

Two deadlines are kept apart. `deadline_ns` is the caller's: then nobody wants the answer any more,
and the request ends. `timeout_ns` is the longest wait that the policy grants: the policy says
whether passing it ends the request or moves it back. Each is over when the clock shows it.

Everything is kept in sorted lists from which entries are removed exactly, so that memory follows
the number of waiting requests, which is bounded. Forming a batch looks at its members and at what
lies between them in the order; in the worst case, many signatures, that is the whole queue.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator

from thirdrail_server.worker.policy import QueuePolicy
from thirdrail_server.worker.queued import NEVER_NS, Queued
from thirdrail_server.worker.turns import Turns

PASSED_OVER_MAX = 16

# Timers are late, so a batch that closes early because of a deadline does so even earlier.
WAKE_SLACK_NS = 1_000_000


class RequestQueue:
    """The waiting requests of one model version. All times are monotonic nanoseconds."""

    def __init__(self, policy: QueuePolicy) -> None:
        self._policy = policy
        self._preferred = frozenset(policy.preferred_rows or (policy.rows_max,))
        self._rows_aim = max(self._preferred)
        self._rows_preferred_min = min(self._preferred)
        self._delay_ns = policy.delay_us_max * 1000
        self._ranks: list[int] = []  # sorted; those of `_lines`
        self._lines: dict[int, Turns] = {}  # by rank, none empty
        self._groups: dict[Hashable, _Group] = {}  # by signature, none empty
        self._ends: list[tuple[int, int, Queued]] = []  # sorted (ends_ns, number, request)
        self._waiting: dict[int, int] = {}  # requests by priority
        self._numbered = 0
        self.count = 0

    def is_full(self, priority: int) -> bool:
        return self._waiting.get(priority, 0) >= self._policy.of(priority).requests_max

    def push(self, queued: Queued, run_ns: int) -> None:
        """Add a request. run_ns: how long a run takes at present, to close batches in time."""
        assert not queued.is_waiting, queued
        self._numbered += 1
        queued.number = self._numbered
        queued.ends_ns = queued.nearest_end_ns
        is_urgent = queued.priority < self._policy.default_priority
        queued.due_ns = min(
            queued.arrived_ns + (0 if is_urgent else self._delay_ns),
            queued.ends_ns - run_ns - WAKE_SLACK_NS,
        )
        self._stand_in_line(queued, 2 * queued.priority)
        self._groups.setdefault(queued.signature, _Group()).add(queued)
        self._waiting[queued.priority] = self._waiting.get(queued.priority, 0) + 1
        self.count += 1

    def remove(self, queued: Queued) -> None:
        """Take out a request that will not run. It uses up nobody's turn."""
        self._leave(queued, is_turn=False)

    def clear(self) -> list[Queued]:
        """Take out everything."""
        everything = list(self._in_order())
        for queued in everything:
            self.remove(queued)
        return everything

    def expire(self, now_ns: int) -> list[Queued]:
        """Take out and return the requests whose time is over; move back the delayed ones."""
        expired = []
        while self._ends and self._ends[0][0] <= now_ns:
            queued = self._ends[0][2]
            if self._is_over(queued, now_ns):
                self.remove(queued)
                expired.append(queued)
            else:
                self._move_back(queued)
        return expired

    def next_batch(self, now_ns: int, *, is_closing: bool = False) -> list[Queued]:
        """Take out the batch that should run now; empty if all that wait should wait longer.

        is_closing: nobody else will come, so there is no company to wait for.
        """
        held: set[Hashable] = set()
        for queued in self._in_order():
            signature = queued.signature
            if signature in held:
                continue
            group = self._groups[signature]
            if members := self._gather(signature, group, is_closing or group.due_ns <= now_ns):
                for member in members:
                    self._leave(member, is_turn=True)
                return members
            held.add(signature)
            if len(held) == len(self._groups):
                break
        return []

    @property
    def next_end_ns(self) -> int:
        """When `expire` has something to do; NEVER_NS if it never has."""
        return self._ends[0][0] if self._ends else NEVER_NS

    @property
    def next_due_ns(self) -> int:
        """When a batch should run even if nobody joins; NEVER_NS if nobody waits."""
        return min((group.due_ns for group in self._groups.values()), default=NEVER_NS)

    def _gather(self, signature: Hashable, group: "_Group", is_due: bool) -> list[Queued]:
        """The members of the group's next batch; empty if it may not go yet."""
        if not is_due and group.rows < self._rows_preferred_min:
            return []
        takes_all = is_due and self._delay_ns > 0  # without a delay every group is always due
        rows_limit = self._policy.rows_max if takes_all else self._rows_aim
        members: list[Queued] = []
        rows = preferred = passed_over = 0
        for queued in self._in_order():
            if queued.signature != signature:
                continue
            if members and rows + queued.rows > rows_limit:
                passed_over += 1
            else:
                members.append(queued)
                rows += queued.rows
                if rows in self._preferred:
                    preferred = len(members)
            is_full = rows >= rows_limit or passed_over > PASSED_OVER_MAX
            if is_full or len(members) + passed_over == len(group):
                break
        if preferred and not takes_all:
            return members[:preferred]
        return members if is_due or is_full or passed_over else []

    def _in_order(self) -> Iterator[Queued]:
        for rank in self._ranks:
            yield from self._lines[rank]

    def _is_over(self, queued: Queued, now_ns: int) -> bool:
        if queued.deadline_ns is not None and queued.deadline_ns <= now_ns:
            return True
        return self._policy.of(queued.priority).timeout_action == "reject"

    def _move_back(self, queued: Queued) -> None:
        self._leave_line(queued, is_turn=False)
        queued.timeout_ns = None
        queued.ends_ns = queued.nearest_end_ns
        self._stand_in_line(queued, 2 * queued.priority + 1)

    def _leave(self, queued: Queued, *, is_turn: bool) -> None:
        self._leave_line(queued, is_turn=is_turn)
        queued.rank = None
        group = self._groups[queued.signature]
        group.remove(queued)
        if not len(group):
            del self._groups[queued.signature]
        self._waiting[queued.priority] -= 1
        self.count -= 1

    def _stand_in_line(self, queued: Queued, rank: int) -> None:
        queued.rank = rank
        line = self._lines.get(rank)
        if line is None:
            line = self._lines[rank] = Turns()
            insort(self._ranks, rank)
        line.add(queued)
        if queued.ends_ns != NEVER_NS:
            insort(self._ends, (queued.ends_ns, queued.number, queued))

    def _leave_line(self, queued: Queued, *, is_turn: bool) -> None:
        assert queued.rank is not None, queued
        line = self._lines[queued.rank]
        line.remove(queued, is_turn=is_turn)
        if not line:
            del self._lines[queued.rank]
            self._ranks.remove(queued.rank)
        if queued.ends_ns != NEVER_NS:
            del self._ends[bisect_left(self._ends, (queued.ends_ns, queued.number))]


class _Group:
    """The waiting requests of one signature: how many rows, and when the first of them is due."""

    __slots__ = ("_dues", "rows")

    def __init__(self) -> None:
        self._dues: list[tuple[int, int]] = []  # sorted (due_ns, number)
        self.rows = 0

    def __len__(self) -> int:
        return len(self._dues)

    @property
    def due_ns(self) -> int:
        return self._dues[0][0]

    def add(self, queued: Queued) -> None:
        insort(self._dues, (queued.due_ns, queued.number))
        self.rows += queued.rows

    def remove(self, queued: Queued) -> None:
        del self._dues[bisect_left(self._dues, (queued.due_ns, queued.number))]
        self.rows -= queued.rows
