# SPDX-License-Identifier: Apache-2.0
"""Runs the checks of a program inside a foreign client's environment, where no test framework is.

A program is a module with functions `check_*(url)`. Its output is one line per check, and the
traceback of each that failed; it exits with 1 when one did.
"""

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

E = TypeVar("E", bound=Exception)

# grpc's own report for the wrong target is long; a traceback's end tells which check and why.
_TRACEBACK_LINES = -12


def raised(kind: type[E], call: Callable[[], Any]) -> E:
    """The exception of this kind that the call fails with."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError("the call was not refused")


def main(names: dict[str, Any]) -> None:
    """names: the program's globals(). Every check gets the program's one argument."""
    url = sys.argv[1]
    checks = {name: value for name, value in names.items() if name.startswith("check_")}
    program = Path(names["__file__"]).stem
    failed = sum(not _passes(name, check, url) for name, check in checks.items())
    print(f"{program}: {len(checks) - failed} of {len(checks)} checks passed")
    sys.exit(1 if failed or not checks else 0)


def _passes(name: str, check: Callable[[str], None], url: str) -> bool:
    started = time.perf_counter()
    try:
        check(url)
    except Exception:
        print(f"FAILED {name}")
        traceback.print_exc(limit=_TRACEBACK_LINES, file=sys.stdout)
        return False
    print(f"ok     {name} ({time.perf_counter() - started:.2f} s)")
    return True
