# SPDX-License-Identifier: Apache-2.0
"""Why a server cannot listen, and which settings are refused: in words, before anything starts."""

import math
import socket
from pathlib import Path
from typing import Any

import pytest

from thirdrail_server.config import (
    ConfigError,
    ServerConfig,
    WorkerConfig,
    bytes_of_gib,
    host_and_port,
)
from thirdrail_server.front.listeners import why_not_bindable


def test_a_free_port_is_bindable_and_a_taken_one_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert why_not_bindable("127.0.0.1", port) == "address already in use"
        assert why_not_bindable("localhost", port) == "address already in use"
    assert why_not_bindable("127.0.0.1", port) is None
    assert why_not_bindable("localhost", 0) is None


def test_somebody_elses_address_is_not_bindable() -> None:
    assert why_not_bindable("192.0.2.1", 0) == "cannot assign requested address"
    assert "'no-such-host.invalid': " in (why_not_bindable("no-such-host.invalid", 0) or "")


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:8001", ("127.0.0.1", 8001)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("[::1]", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(address: str, parts: tuple[str, int]) -> None:
    assert host_and_port(address) == parts


@pytest.mark.parametrize(
    "address", ["", "host", ":8001", "host:", "host:x", "host:-1", "host:65536", "::1", "::1:8001"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        ServerConfig(Path("models"), address=address)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"metrics_port": 65536}, "metrics_port must be 0 to 65535, got 65536"),
        ({"connections_max": 0}, "connections_max must be 1 or more, got 0"),
        (
            {"connections_max": 1 << 32},
            "connections_max must be at most 2000000000, got 4294967296",
        ),
        ({"concurrent_calls_max": 1 << 32}, "concurrent_calls_max must be at most 2000000000"),
        ({"message_bytes_max": -1}, "message_bytes_max must be 1 or more, got -1"),
        ({"shutdown_s_max": -1.0}, "shutdown_s_max must be 0 or more, got -1.0"),
        ({"shutdown_s_max": float("nan")}, "shutdown_s_max must be 0 or more, got nan"),
        ({"poll_interval_s": 0.0}, "poll_interval_s must be above 0, got 0.0"),
        ({"load_models": ("m",)}, "load_models needs model_control explicit"),
    ],
)
def test_settings_of_the_server_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ServerConfig(Path("models"), **settings)


def test_an_amount_of_memory_is_a_number() -> None:
    assert bytes_of_gib("bytes_max", 1.5) == 3 << 29
    for gib in (math.inf, math.nan, -1, 1e300):
        with pytest.raises(ConfigError, match="bytes_max must be a number of GiB, 0 or more, got"):
            bytes_of_gib("bytes_max", gib)


@pytest.mark.parametrize(
    ("name", "value"), [("threads_max", -1), ("queue_requests_max", 0), ("derive_batch_rows", 1)]
)
def test_settings_of_the_worker_are_checked(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be .*, got {value}"):
        WorkerConfig(**{name: value})  # type: ignore[arg-type]
