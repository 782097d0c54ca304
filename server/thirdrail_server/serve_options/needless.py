# SPDX-License-Identifier: Apache-2.0
"""Options that change nothing beside the others. They are refused: whoever gives one expects
something of it, and would not get it without a word.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import typer

from thirdrail_server.config import ConfigError, ModelControlMode, OverBudget, ServerConfig


@dataclass(frozen=True, slots=True)
class _Need:
    options: tuple[str, ...]  # by the names of serve's parameters
    is_met: Callable[[ServerConfig], object]
    where_not: str


_NEEDS = (
    _Need(
        ("address", "tls_cert", "tls_key", "tls_client_ca"),
        lambda config: config.address is not None,
        "with --no-tcp",
    ),
    _Need(("socket",), lambda config: config.socket is not None, "with --no-socket"),
    _Need(
        ("max_sessions", "max_sessions_per_uid", "lane_memory_mib"),
        lambda config: config.lane and config.socket is not None,
        "with --no-lane or --no-socket",
    ),
    _Need(
        ("lane_uid",),
        lambda config: config.socket is not None or config.allow_client_shm,
        "with --no-socket and without --allow-client-shm",
    ),
    _Need(
        ("poll_interval",),
        lambda config: config.model_control is ModelControlMode.POLL,
        "without --model-control poll",
    ),
    _Need(("device_memory_gib",), lambda config: config.devices != (), "with --devices cpu"),
    _Need(
        ("over_budget", "swap"),
        lambda config: config.memory.bytes_max or config.memory.device_bytes_max,
        "without --memory-gib or --device-memory-gib",
    ),
    _Need(
        ("evict_after",),
        lambda config: config.memory.over_budget is OverBudget.EVICT,
        "without --over-budget evict",
    ),
    _Need(
        ("metrics_host",),
        lambda config: config.metrics_port is not None,
        "without --metrics-port",
    ),
)


def given_options(ctx: typer.Context) -> set[str]:
    """The parameters that were typed, whatever their values."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def refuse_needless(given: Iterable[str], config: ServerConfig) -> None:
    """Raises ConfigError for the first of the parameters `given` that changes nothing."""
    for need in _NEEDS:
        for name in need.options:
            if name in given and not need.is_met(config):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} changes nothing {need.where_not}")
