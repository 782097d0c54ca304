# SPDX-License-Identifier: Apache-2.0
"""Which models, on which processors."""

from typing import Annotated

from thirdrail_server.config import ConfigError, ModelControlMode
from thirdrail_server.serve_options.panel import in_panel

option = in_panel("Models")

ModelControl = Annotated[
    ModelControlMode,
    option(
        "none: load everything at the start. explicit: load and unload on demand. "
        "poll: follow the repository's files.",
        "--model-control",
    ),
]
LoadModel = Annotated[
    list[str] | None,
    option(
        "With explicit control: load this model at the start. Repeatable; '*' for all.",
        "--load-model",
        metavar="NAME",
    ),
]
PollInterval = Annotated[
    float,
    option("Seconds between two looks at the repository.", "--poll-interval"),
]
DeriveBatching = Annotated[
    int,
    option(
        "Batch up to this many rows in models without a configuration, where a proof at load "
        "shows that batched and single rows agree. 0: off.",
        "--derive-batching",
        metavar="ROWS",
    ),
]
SuggestConfig = Annotated[
    bool,
    option(
        "Print the configuration that each model would get, with what was derived, and exit.",
        "--suggest-config",
    ),
]
Threads = Annotated[
    int,
    option("CPU threads for the models together. 0: one per core.", "--threads"),
]
Devices = Annotated[
    list[str] | None,
    option(
        "A GPU to run models on, by UUID or number. Repeatable; 'auto' for all there are, "
        "'cpu' for none. The CPU is always there. \\[default: auto]",
        "--devices",
        metavar="UUID|NUMBER|auto|cpu",
    ),
]


def devices_of(texts: list[str] | None) -> tuple[str, ...] | None:
    """The GPUs that are named; None: all there are."""
    names = [name.strip() for text in texts or ["auto"] for name in text.split(",")]
    if "auto" in names:
        if len(names) > 1:
            raise ConfigError("--devices auto means all GPUs, it stands alone")
        return None
    if "" in names:
        raise ConfigError("--devices takes auto, cpu, UUIDs and numbers, got an empty name")
    return tuple(name for name in names if name != "cpu")
