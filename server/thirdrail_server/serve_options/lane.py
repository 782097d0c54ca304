# SPDX-License-Identifier: Apache-2.0
"""Who may attach to a worker, and what all of them may use."""

from typing import Annotated

from thirdrail_server.config import ConfigError, SessionLimits
from thirdrail_server.serve_options.panel import in_panel

option = in_panel("Lane")

NoLane = Annotated[
    bool,
    option("Let no client attach: no calls through shared memory.", "--no-lane"),
]
LaneUid = Annotated[
    list[str] | None,
    option(
        "A user who may attach. Repeatable; 'any' for all. \\[default: the server's own]",
        "--lane-uid",
        metavar="UID",
    ),
]
MaxSessions = Annotated[int, option("Clients attached at once.", "--max-sessions")]
MaxSessionsPerUid = Annotated[
    int,
    option("The same, of one user.", "--max-sessions-per-uid"),
]
LaneMemoryMib = Annotated[
    int,
    option(
        "Shared memory of all clients together; one user gets half of it.",
        "--lane-memory-mib",
    ),
]
HugePages = Annotated[
    bool,
    option(
        "Make shared memory of 2 MiB pages that the host has set aside, as long as there are any; "
        "else the kernel makes such pages as it can.",
        "--huge-pages",
    ),
]


def uids_of(texts: list[str] | None) -> tuple[int, ...] | None:
    if not texts:
        return SessionLimits().uids
    if "any" in texts:
        return None
    for text in texts:
        if not (text.isascii() and text.isdecimal()):
            raise ConfigError(f"--lane-uid takes a user's number, or any, got '{text}'")
    return tuple(map(int, texts))
