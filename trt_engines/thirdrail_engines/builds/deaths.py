# SPDX-License-Identifier: Apache-2.0
"""How a build's process ended, in words."""

import signal
from pathlib import Path

from thirdrail_engines.builds.wire import presentable

_LINES_MAX = 5
_CHARS_MAX = 1000


def describe_end(status: int) -> str:
    """status: as subprocess has it, negative for a signal."""
    if status >= 0:
        return f"ended with exit code {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def last_words(output: bytes) -> str:
    """The end of what it printed, to be put behind the text of an error."""
    lines = [presentable(line) for line in output.decode(errors="replace").splitlines()]
    text = " | ".join([line for line in lines if line][-_LINES_MAX:])
    if len(text) > _CHARS_MAX:
        text = "..." + text[-_CHARS_MAX:]
    return f"; its last words: {text}" if text else ""


def kernel_oom_kills() -> int:
    """How often the kernel has killed on this host for want of memory; 0 where it does not say."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
