# SPDX-License-Identifier: Apache-2.0
"""The demo's own server: `thirdrail serve` as a child process on a Unix socket."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

READY_SECONDS_MAX = 60
STOP_SECONDS_MAX = 40  # above the server's own bound for its shutdown
POLL_SECONDS = 0.05
LOG_LINES_SHOWN = 20


class ServerError(Exception):
    """The server did not become ready. The text holds the end of its log."""


@contextmanager
def serving(repository: Path, socket: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server for the repository, reachable by nothing but the socket; stopped on leaving.

    It may not be ready yet: see `wait_until_ready`.
    """
    command = [sys.executable, "-m", "thirdrail", "serve", str(repository)]
    command += [f"--socket={socket}", "--no-tcp"]
    with log.open("wb") as log_file:
        # In a group of its own, so that Ctrl-C reaches it through us alone, after our last call.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        yield process
    finally:
        _stop(process)


def wait_until_ready(
    process: subprocess.Popen[bytes], log: Path, is_ready: Callable[[], bool]
) -> None:
    """Returns once `is_ready` says so. Raises ServerError if the server ends or takes too long."""
    deadline = time.monotonic() + READY_SECONDS_MAX
    while not is_ready():
        if process.poll() is not None:
            raise ServerError(f"the server ended with {process.returncode}:\n{_end_of(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"not ready after {READY_SECONDS_MAX} s:\n{_end_of(log)}")
        time.sleep(POLL_SECONDS)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-LOG_LINES_SHOWN:])
