# SPDX-License-Identifier: Apache-2.0
"""Which worker a model's calls go to: a session belongs to one worker, and a model runs in some.

A server with one worker has nothing to choose from, and nothing here is asked for then. Where there
are several, the server is asked once in a while where a model runs, and of several workers the one
is taken that has the fewest calls of ours. Arrays of `empty`, exports and what was received belong
to the session with the server's first worker: for a model of another one they are copied.
"""

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from thirdrail.transport import Transport

PLACES_KEPT_MAX = 1024
PLACE_NS_MAX = 10_000_000_000  # a worker that comes back takes its part again

Workers = tuple[str, ...]


class Access(Protocol):
    """The way onto the lane of one worker."""

    @property
    def workers(self) -> Workers:
        """All that the server has; none before it was asked."""
        ...

    @property
    def calls_in_flight(self) -> int: ...

    @property
    def transport(self) -> Transport: ...

    def leave(self) -> None: ...


A = TypeVar("A", bound=Access)


class Lanes(Generic[A]):
    """Of one connection. Threads may share it: whatever they keep is the same.

    access_to: makes the way to a worker; "" is the server's first.
    """

    def __init__(self, access_to: Callable[[str], A]) -> None:
        self.home = access_to("")
        self._access_to = access_to
        self._others: dict[str, A] = {}  # by worker
        self._places: dict[str, tuple[int, Workers]] = {}  # by model: since when it is known

    @property
    def are_several(self) -> bool:
        """Whether models have to be looked for. Known when somebody has attached."""
        return len(self.home.workers) > 1

    def place(self, model: str, now_ns: int) -> Workers | None:
        """The workers that serve a model; None: the server has to be asked."""
        since_ns, workers = self._places.get(model, (0, None))
        return None if workers is None or now_ns - since_ns > PLACE_NS_MAX else workers

    def known(self, model: str) -> Workers:
        """As the server said last, however long ago; none: it said nothing."""
        return self._places.get(model, (0, ()))[1]

    def found(self, model: str, workers: Sequence[str], now_ns: int) -> Workers:
        """What the server said."""
        if len(self._places) >= PLACES_KEPT_MAX:
            self._places.clear()
        self._places[model] = now_ns, tuple(workers)
        return tuple(workers)

    def forget(self, model: str) -> bool:
        """It was not there. Whether another place may be found for it."""
        return self._places.pop(model, None) is not None

    def to(self, workers: Workers) -> list[A]:
        """The ways to them, the least busy first; to the first worker where there are none."""
        if len(workers) < 2:
            return [self._to_one(workers[0]) if workers else self.home]
        return sorted(map(self._to_one, workers), key=lambda each: each.calls_in_flight)

    @property
    def transport(self) -> Transport:
        """What calls travel on: of the first worker that we are attached to."""
        all_of_them = [self.home.transport, *(each.transport for each in self._all_others())]
        return next((each for each in all_of_them if each.name == "lane"), all_of_them[0])

    def leave(self) -> None:
        """End all sessions. Calls in flight end with Cancelled."""
        for each in (self.home, *self._all_others()):
            each.leave()

    def _to_one(self, worker: str) -> A:
        if worker == self.home.workers[0]:
            return self.home
        return self._others.setdefault(worker, self._others.get(worker) or self._access_to(worker))

    def _all_others(self) -> list[A]:
        return list(self._others.values())
