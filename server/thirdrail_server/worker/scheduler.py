# SPDX-License-Identifier: Apache-2.0
"""The scheduler of one model version: its queue, its running batches, its free instances.

It decides, the caller performs: every event returns a list of actions, to be done in order. The
caller reads `wake_at_ns` after each event and calls `tick` no later than that.

Every request that arrives ends exactly once, in one of two ways: by an `End`, or by being among the
owed of a finished batch. A request that was cancelled while it ran has had its End; its rows are
computed and dropped. Once a request runs, its deadlines count no more: the run answers it.
"""

from typing import Any, NamedTuple, TypeAlias

from thirdrail import errors
from thirdrail_server.worker.policy import QueuePolicy
from thirdrail_server.worker.queue import RequestQueue
from thirdrail_server.worker.queued import NEVER_NS, Queued

QUEUE_FULL_TEXT = "Exceeds maximum queue size"
TIMED_OUT_TEXT = "Request timeout expired"
CANCELLED_TEXT = "Request cancelled"


class Batch:
    """Requests that run together, in the order in which their rows are to be laid out."""

    __slots__ = ("members", "rows")

    def __init__(self, members: list[Queued]) -> None:
        self.members = members
        self.rows = sum([member.rows for member in members])


class Start(NamedTuple):
    """Run the batch now, on an instance of its own, and call `finished` when it is over."""

    batch: Batch


class End(NamedTuple):
    """Answer the request with the error. It is gone from the scheduler."""

    key: Any
    error: errors.ThirdrailError


Action: TypeAlias = Start | End


class Scheduler:
    """The scheduling of one model version. All times are monotonic nanoseconds.

    instances: how many batches may run at once, 1 or more.
    """

    def __init__(self, policy: QueuePolicy, *, instances: int) -> None:
        assert instances >= 1, instances
        self._policy = policy
        self._starts_at_once = policy.delay_us_max == 0
        self._queue = RequestQueue(policy)
        self._running: set[Batch] = set()
        self._instances_free = instances
        self._live: dict[Any, Queued] = {}  # by key: all that have not ended, waiting or running
        self._run_ns = 0
        self._refusal = ""  # not empty: stopped, and why
        self._is_dead = False

    def arrive(self, queued: Queued, now_ns: int) -> list[Action]:
        """Take in a request. Refused with Unavailable after a stop, with QueueFull when full."""
        assert queued.key not in self._live, queued
        assert 1 <= queued.rows <= (self._policy.rows_max or queued.rows), queued
        if self._refusal:
            return [End(queued.key, errors.Unavailable(self._refusal))]
        if self._can_start_at_once(queued, now_ns):
            self._live[queued.key] = queued
            return [self._start([queued])]
        actions = self._expire(now_ns)
        if self._queue.is_full(queued.priority):
            return [*actions, End(queued.key, errors.QueueFull(QUEUE_FULL_TEXT))]
        self._live[queued.key] = queued
        self._queue.push(queued, self._run_ns)
        return actions + self._advance(now_ns)

    def cancel(self, key: Any, now_ns: int) -> list[Action]:
        """End a request, waiting or running. Nothing happens if it is unknown or has ended."""
        queued = self._live.pop(key, None)
        if queued is None:
            return []
        cancelled = End(key, errors.Cancelled(CANCELLED_TEXT))
        if not queued.is_waiting:
            return [cancelled]
        self._queue.remove(queued)
        return [cancelled, *self._advance(now_ns)]

    def tick(self, now_ns: int) -> list[Action]:
        """Do what time alone makes necessary. Never wrong to call."""
        return self._advance(now_ns)

    def finished(
        self, batch: Batch, now_ns: int, run_ns: int | None
    ) -> tuple[list[Queued], list[Action]]:
        """A run is over, its instance free. Returns the members still owed an answer, and actions.

        run_ns: how long the run took; None if it failed, which says nothing about the next one.
        After `die` nobody is owed anything.
        """
        if self._is_dead:
            return [], []
        self._running.remove(batch)
        self._instances_free += 1
        if run_ns is not None:
            self._note_run(run_ns)
        live = self._live
        owed = [member for member in batch.members if live.get(member.key) is member]
        for member in owed:
            del live[member.key]
        return owed, self._advance(now_ns) if self._queue.count else []

    def stop(self, now_ns: int, text: str, *, at_once: bool = False) -> list[Action]:
        """Refuse newcomers with Unavailable(text) from now on; running batches finish.

        at_once: what waits ends in the same way. Otherwise it runs, without waiting for company.
        """
        assert text
        self._refusal = text
        if not at_once:
            return self._advance(now_ns)
        return [self._end(queued, errors.Unavailable(text)) for queued in self._queue.clear()]

    def die(self, text: str) -> list[Action]:
        """What ran the batches is gone: everything ends as Unavailable(text), newcomers too."""
        assert text
        self._refusal = text
        self._is_dead = True
        self._queue.clear()
        self._running.clear()
        return [self._end(queued, errors.Unavailable(text)) for queued in list(self._live.values())]

    @property
    def wake_at_ns(self) -> int | None:
        """When `tick` must be called unless another event comes first; None: no need to."""
        if not self._queue.count:
            return None
        if self._instances_free:
            return self._queue.next_due_ns  # requests are due before their deadlines end them
        end_ns = self._queue.next_end_ns
        return end_ns if end_ns < NEVER_NS else None

    @property
    def starts_newcomers(self) -> bool:
        """Whether a request that came now would be started at once and alone."""
        return self._instances_free > 0 and self._starts_at_once and not self._refusal

    @property
    def queued_count(self) -> int:
        """Requests that wait."""
        return self._queue.count

    @property
    def running_count(self) -> int:
        """Requests that run and were not cancelled."""
        return len(self._live) - self._queue.count

    @property
    def busy_instances(self) -> int:
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Nothing waits and no instance is busy, not even for cancelled requests."""
        return not self._queue.count and not self._running

    def _can_start_at_once(self, queued: Queued, now_ns: int) -> bool:
        """Whether the queue can be left out, which comes to the same: the most common case.

        A free instance means that nobody waits, if nobody ever waits for company.
        """
        return self._instances_free > 0 and self._starts_at_once and queued.nearest_end_ns > now_ns

    def _advance(self, now_ns: int) -> list[Action]:
        """End what expired, then start what may run."""
        actions = self._expire(now_ns)
        while self._instances_free and self._queue.count:
            members = self._queue.next_batch(now_ns, is_closing=bool(self._refusal))
            if not members:
                break
            actions.append(self._start(members))
        return actions

    def _expire(self, now_ns: int) -> list[Action]:
        if self._queue.next_end_ns > now_ns:
            return []
        expired = self._queue.expire(now_ns)
        return [self._end(queued, errors.TimedOut(TIMED_OUT_TEXT)) for queued in expired]

    def _start(self, members: list[Queued]) -> Start:
        batch = Batch(members)
        self._running.add(batch)
        self._instances_free -= 1
        return Start(batch)

    def _end(self, queued: Queued, error: errors.ThirdrailError) -> End:
        del self._live[queued.key]
        return End(queued.key, error)

    def _note_run(self, run_ns: int) -> None:
        """Follow longer runs quickly and shorter ones slowly: late is worse than early."""
        longer_ns = run_ns - self._run_ns
        if not self._run_ns:
            self._run_ns = run_ns
        else:
            self._run_ns += longer_ns // 2 if longer_ns > 0 else longer_ns // 8
