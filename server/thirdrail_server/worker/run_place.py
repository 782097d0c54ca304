# SPDX-License-Identifier: Apache-2.0
"""Where the runs of a model happen: on the worker's loop or beside it.

On the loop they are spared two switches of threads, which take longer than many runs; and everybody
else waits for them. So only short runs belong there.
"""

from dataclasses import dataclass

# A request of a model that trial runs put on the loop goes to a thread all the same when its inputs
# are larger, unless earlier ones of its kind were short.
INLINE_INPUT_BYTES_MAX = 64 << 10
# So many runs on threads say whether a model's runs are short: by their median, since a thread that
# waits for a core takes long for a short run as well.
ROUND_RUNS = 32
ROUNDS_MAX = 1024  # that must be short, one after the other, for a model that often left the loop


@dataclass(frozen=True, slots=True)
class RunPlace:
    """What is known when a model is loaded.

    on_loop: trial runs were short. learns: whether its runs will be short in future can be seen
        from those of its callers, so it may come to the loop, and come back.
    run_ns_max: of a short run. overrun_ns_max: of a run on the loop, see RunHistory.
    """

    on_loop: bool
    learns: bool = False
    run_ns_max: int = 0
    overrun_ns_max: int = 0


class RunHistory:
    """What the runs of a model took, and where the next one belongs.

    A run on the loop that takes longer than the second bound makes the model suspect: its next run
    is sent to a thread and its CPU time is looked at, which a busy host does not inflate. Only if
    that is too long as well does the model leave the loop. (The CPU clock is a system call, the
    wall clock is not.) Each time it takes twice as many short runs to come back.
    """

    def __init__(self, place: RunPlace) -> None:
        self._place = place
        self.on_loop = place.on_loop
        self.is_suspect = False
        self._short_bytes_max = INLINE_INPUT_BYTES_MAX if place.on_loop else 0
        self._large_runs = LargeRuns(place.run_ns_max)
        self._round = _Round(place.run_ns_max)
        self._rounds_short = 0
        self._rounds_wanted = 1

    @property
    def may_return(self) -> bool:
        """To the loop, once it has left it."""
        return self._place.learns

    def is_for_loop(self, input_bytes: int) -> bool:
        """Whether a run with inputs of this size belongs there, if the model is not suspect."""
        return self.on_loop and (
            input_bytes <= self._short_bytes_max or self._large_runs.are_short(input_bytes)
        )

    def is_overrun(self, run_ns: int) -> bool:
        return run_ns > self._place.overrun_ns_max

    def ran_on_loop(self, input_bytes: int, run_ns: int) -> None:
        if input_bytes <= self._short_bytes_max:
            self.is_suspect = self.is_overrun(run_ns)
        else:  # which says nothing of smaller ones
            self._large_runs.note(input_bytes, run_ns)

    def ran_on_thread(self, input_bytes: int, run_ns: int) -> None:
        """run_ns: by the wall clock."""
        if self.on_loop:
            if input_bytes > self._short_bytes_max:
                self._large_runs.note(input_bytes, run_ns)
        elif self._place.learns and self._round.note(input_bytes, run_ns):
            self._rounds_short = self._rounds_short + 1 if self._round.was_short else 0
            if self._rounds_short >= self._rounds_wanted:
                self.on_loop = True
                self._short_bytes_max = self._round.short_bytes_max

    def leave_loop(self) -> None:
        self.on_loop = self.is_suspect = False
        self._large_runs = LargeRuns(self._place.run_ns_max)
        self._rounds_short = 0
        self._rounds_wanted = min(2 * self._rounds_wanted, ROUNDS_MAX)


class _Round:
    """So many runs on threads.

    was_short: whether those of the last whole round were. short_bytes_max: the largest inputs of
        them whose run was.
    """

    def __init__(self, run_ns_max: int) -> None:
        self._run_ns_max = run_ns_max
        self._runs: list[tuple[int, int]] = []
        self.was_short = False
        self.short_bytes_max = 0

    def note(self, input_bytes: int, run_ns: int) -> bool:
        """True: the round is whole."""
        self._runs.append((run_ns, input_bytes))
        if len(self._runs) < ROUND_RUNS:
            return False
        runs, self._runs = sorted(self._runs), []
        self.was_short = runs[ROUND_RUNS // 2][0] <= self._run_ns_max
        sizes = [size for took_ns, size in runs if took_ns <= self._run_ns_max]
        self.short_bytes_max = max(sizes, default=0)
        return True


class LargeRuns:
    """How long runs with large inputs take, by the byte: longer ones are followed at once, shorter
    ones slowly."""

    def __init__(self, run_ns_max: int) -> None:
        self._run_ns_max = run_ns_max
        self._ns_per_byte = 0.0

    def note(self, input_bytes: int, run_ns: int) -> None:
        seen = run_ns / input_bytes
        more = seen - self._ns_per_byte
        self._ns_per_byte = seen if more > 0 else self._ns_per_byte + more / 8

    def are_short(self, input_bytes: int) -> bool:
        """False also before any was seen."""
        return 0 < self._ns_per_byte * input_bytes <= self._run_ns_max
