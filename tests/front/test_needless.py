# SPDX-License-Identifier: Apache-2.0
"""Options of `thirdrail serve` that change nothing beside the others."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from thirdrail.cli import extensions
from thirdrail_server.cli import serve
from thirdrail_server.config import (
    ConfigError,
    MemoryBudget,
    ModelControlMode,
    OverBudget,
    ServerConfig,
)
from thirdrail_server.serve_options import needless

SOCKET = Path("grpc.sock")
BUDGET = "without --memory-gib or --device-memory-gib"
EVICTING: dict[str, Any] = {
    "model_control": ModelControlMode.EXPLICIT,
    "memory": MemoryBudget(1, OverBudget.EVICT),
}


@pytest.mark.parametrize(
    ("option", "settings", "text"),
    [
        ("address", {"address": None}, "--address changes nothing with --no-tcp"),
        ("tls_client_ca", {"address": None}, "--tls-client-ca changes nothing with --no-tcp"),
        ("socket", {"socket": None}, "--socket changes nothing with --no-socket"),
        ("max_sessions_per_uid", {"lane": False}, "--max-sessions-per-uid changes nothing with"),
        ("lane_memory_mib", {"socket": None}, "with --no-lane or --no-socket"),
        ("lane_uid", {"socket": None}, "with --no-socket and without --allow-client-shm"),
        ("poll_interval", {}, "--poll-interval changes nothing without --model-control poll"),
        ("device_memory_gib", {"devices": ()}, "--device-memory-gib changes nothing with"),
        ("swap", {}, f"--swap changes nothing {BUDGET}"),
        ("over_budget", {}, f"--over-budget changes nothing {BUDGET}"),
        ("evict_after", {"memory": MemoryBudget(1)}, "without --over-budget evict"),
        ("metrics_host", {}, "--metrics-host changes nothing without --metrics-port"),
    ],
)
def test_what_changes_nothing_is_refused_by_name(
    option: str, settings: dict[str, Any], text: str
) -> None:
    config = ServerConfig(Path("models"), **({"socket": SOCKET} | settings))
    with pytest.raises(ConfigError, match=text):
        needless.refuse_needless({"repository", option}, config)
    needless.refuse_needless({"repository"}, config)


@pytest.mark.parametrize(
    ("option", "settings"),
    [
        ("address", {}),
        ("socket", {}),
        ("max_sessions", {}),
        ("lane_uid", {"lane": False}),  # other users may still use the socket
        ("lane_uid", {"socket": None, "allow_client_shm": True}),
        ("poll_interval", {"model_control": ModelControlMode.POLL}),
        ("device_memory_gib", {"devices": ("0",)}),
        ("device_memory_gib", {}),
        ("swap", {"memory": MemoryBudget(device_bytes_max=1)}),
        ("over_budget", {"memory": MemoryBudget(1)}),
        ("evict_after", EVICTING),
        ("metrics_host", {"metrics_port": 0}),
    ],
)
def test_what_changes_something_is_taken(option: str, settings: dict[str, Any]) -> None:
    config = ServerConfig(Path("models"), **({"socket": SOCKET} | settings))
    needless.refuse_needless({"repository", option}, config)


def test_what_was_typed_counts_whatever_its_value() -> None:
    typed = ["models", "--swap=refuse", "--lane-uid", "7", "--no-tcp"]
    with extensions.load("serve").make_context("serve", typed) as context:
        assert needless.given_options(context) == {"repository", "swap", "lane_uid", "no_tcp"}


def test_all_of_them_are_options_of_serve() -> None:
    named = {name for need in needless._NEEDS for name in need.options}
    assert named <= inspect.signature(serve).parameters.keys()
