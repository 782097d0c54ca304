# SPDX-License-Identifier: Apache-2.0
"""Where the batches of a model run: on the worker's loop or beside it."""

from dataclasses import dataclass

# A request of a model that runs on the loop goes to a thread all the same when its inputs are
# larger, unless earlier ones of its kind were short.
INLINE_INPUT_BYTES_MAX = 64 << 10


@dataclass(frozen=True, slots=True)
class RunPlace:
    """Where batches run: on instance threads, or on the loop as long as runs stay short.

    A run on the loop that takes longer makes the model suspect: its next run is sent to a thread
    and its CPU time is looked at, which a busy host does not inflate. Only if that is too long as
    well does the model leave the loop, for good. (The CPU clock is a system call, the wall clock is
    not.)
    """

    on_loop: bool
    overrun_ns_max: int = 0
    large_run_ns_max: int = 0  # of a run with large inputs, as far as it can be foretold


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
