# SPDX-License-Identifier: Apache-2.0
"""Building plans, and keeping them."""

from pathlib import Path
from typing import Annotated

from thirdrail_server.serve_options.panel import in_panel

option = in_panel("Compiling")

CacheDir = Annotated[
    Path | None,
    option(
        "Where plans are kept. \\[default: thirdrail/plans in the user's cache folder]",
        "--cache-dir",
        metavar="DIR",
    ),
]
CacheGib = Annotated[
    float,
    option("Its size; what was not used for longest leaves first.", "--cache-gib"),
]
ReadOnlyCache = Annotated[
    list[Path] | None,
    option(
        "Another cache, filled elsewhere, that is looked into as well. Repeatable.",
        "--read-only-cache",
        metavar="DIR",
    ),
]
BuildMinutesMax = Annotated[float, option("How long one build may take.", "--build-minutes-max")]
BuildMemoryGib = Annotated[
    float,
    option("Memory of one build. 0: no limit.", "--build-memory-gib"),
]
BuildsAtOnce = Annotated[int, option("Builds at once.", "--builds-at-once")]
Fallback = Annotated[
    bool,
    option(
        "Whether a model whose first engine cannot be had is served by another one, visibly, "
        "where its configuration says nothing (on_compile_failure).",
        "--fallback/--no-fallback",
    ),
]


def default_cache() -> Path | None:
    from thirdrail_engines.plan_cache import default_folder

    try:
        return default_folder()
    except RuntimeError:  # a user without a home folder
        return None
