# SPDX-License-Identifier: Apache-2.0
"""How the server is watched, and all else."""

import os
from typing import Annotated

import typer

from thirdrail_server.config import ConfigError
from thirdrail_server.serve_options.panel import in_panel

option = in_panel("Operation")

BusyPollUs = Annotated[
    int,
    option(
        "How long a process looks for news before it sleeps, where news has come that fast; "
        "0 never looks. Saves wake-ups, costs at most this much of a core for each wait.",
        "--busy-poll-us",
    ),
]
MetricsPort = Annotated[
    int | None,
    option(
        "Serve Prometheus /metrics on this port. \\[default: off]",
        "--metrics-port",
    ),
]
MetricsHost = Annotated[str, option("The address for it.", "--metrics-host")]
ServerName = Annotated[
    str,
    option("What KServe clients are told the server is called.", "--server-name"),
]
ReadyWhen = Annotated[
    str,
    option(
        "all-models: ready when every startup model is. live: as soon as calls are answered.",
        "--ready-when",
    ),
]
Compress = Annotated[bool, option("Compress responses with gzip.", "--compress")]
AllowClientShm = Annotated[
    bool,
    option(
        "Let KServe clients register shared memory: files in /dev/shm of the server's user and "
        "of --lane-uid. Whoever may call the server may then have them read and written.",
        "--allow-client-shm",
    ),
]
Channelz = Annotated[bool, option("Offer gRPC's channelz debugging service.", "--channelz")]
LogLevel = Annotated[str, option("debug, info, warning or error.", "--log-level")]
LogFormat = Annotated[str, option("text, or json: one object a line.", "--log-format")]


def is_strict(ready_when: str) -> bool:
    if ready_when not in ("all-models", "live"):
        raise ConfigError(f"--ready-when takes all-models or live, got '{ready_when}'")
    return ready_when == "all-models"


def configure_logs(level: str, form: str) -> None:
    from thirdrail_server.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, configure_logging

    if level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(f"--log-level takes debug, info, warning or error, got '{level}'")
    if form not in ("text", "json"):
        raise typer.BadParameter(f"--log-format takes text or json, got '{form}'")
    os.environ[LEVEL_VARIABLE], os.environ[FORMAT_VARIABLE] = level, form
    configure_logging(process="front")
