# SPDX-License-Identifier: Apache-2.0
"""Builds wait for each other: so many at once in this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from thirdrail_engines.plans import BuildError, BuildFault, TellProgress

_LOOK_S = 0.05  # how long a cancel may go unnoticed


class _Running:
    """How many builds this process has under way."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = 0


_running = _Running()


@contextmanager
def turn(at_once_max: int, tell: TellProgress, cancelled: threading.Event) -> Iterator[None]:
    """Raises BuildError CANCELLED when that is set while waiting."""
    with _running.changed:
        if _running.count >= at_once_max:
            tell("waiting for another build", 0, 0)
        while _running.count >= at_once_max:  # ends: every build does, or by a cancel
            if cancelled.is_set():
                raise cancelled_error()
            _running.changed.wait(_LOOK_S)
        _running.count += 1
    try:
        yield
    finally:
        with _running.changed:
            _running.count -= 1
            _running.changed.notify_all()


def cancelled_error() -> BuildError:
    return BuildError(BuildFault.CANCELLED, "the build was cancelled")
