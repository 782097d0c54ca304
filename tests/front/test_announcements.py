# SPDX-License-Identifier: Apache-2.0
"""What the log says about a start: places, models, what is missing, what to type next."""

import logging
from pathlib import Path
from typing import Any

import pytest

from thirdrail.discovery import default_socket_path
from thirdrail_server.config import ModelControlMode, ServerConfig, TlsFiles
from thirdrail_server.control_messages import LoadedModel
from thirdrail_server.front.announcements import listening, shortened, started, still_loading
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig

REPOSITORY = Path("/models")
SOCKET = Path("/run/x.sock")


@pytest.fixture
def catalog() -> Catalog:
    return Catalog(models_max=10, watchers_max=2)


def config(**settings: Any) -> ServerConfig:
    return ServerConfig(REPOSITORY, **{"socket": default_socket_path(), **settings})


def serve(catalog: Catalog, *names: str) -> None:
    for name in names:
        catalog.begin_load(name, [1], "cpu")
        loaded = LoadedModel(ModelConfig(name=name), {1: None})
        catalog.end_load(name, loaded, "cpu")


def test_says_where_it_listens() -> None:
    both = config(socket=SOCKET)
    assert listening(both, "h:1") == "listening on h:1 and unix:/run/x.sock"
    assert listening(config(socket=None), "h:1") == "listening on h:1"
    assert listening(both, None) == "listening on unix:/run/x.sock"
    tls = config(socket=None, tls=TlsFiles(Path("c"), Path("k")))
    assert listening(tls, "h:1") == "listening on h:1 (TLS)"


def test_a_whole_start(catalog: Catalog) -> None:
    catalog.expect(["a", "b"])
    serve(catalog, "a", "b")
    expected = (logging.INFO, "ready after 1.50 s: 2 models; see `thirdrail models`")
    assert started(catalog, config(), 1.5) == expected
    catalog.end_unload("b")
    assert "1 model;" in started(catalog, config(), 1.5)[1]


@pytest.mark.parametrize(
    ("settings", "command"),
    [
        ({"socket": SOCKET}, "thirdrail models --url unix:/run/x.sock"),
        ({"socket": Path("/a b/x.sock")}, "thirdrail models --url 'unix:/a b/x.sock'"),
        ({"socket": None}, "thirdrail models"),
        ({"socket": None, "address": "127.0.0.1:9000"}, "thirdrail models --url 127.0.0.1:9000"),
        ({"address": None}, "thirdrail models"),
    ],
)
def test_the_command_finds_this_server(
    catalog: Catalog, settings: dict[str, Any], command: str
) -> None:
    catalog.expect(["a"])
    serve(catalog, "a")
    assert started(catalog, config(**settings), 1)[1].endswith(f"see `{command}`")


def test_a_start_with_failures_names_them_and_what_health_says(catalog: Catalog) -> None:
    catalog.expect(["a", "b"])
    serve(catalog, "a")
    catalog.fail_load("b", "damaged")
    level, text = started(catalog, config(), 1)
    assert level == logging.WARNING
    assert text.startswith("started after 1.00 s with 1 of 2 models; not loaded: b; `thirdrail mod")
    assert "health says NOT_SERVING" in text
    _, text = started(catalog, config(strict_readiness=False), 1)
    assert "health" not in text


def test_a_start_without_models(catalog: Catalog) -> None:
    catalog.expect([])
    level, text = started(catalog, config(), 1)
    assert level == logging.WARNING
    assert "'/models' has no folder of a model, expected MODEL/VERSION/model.onnx" in text
    explicit = config(model_control=ModelControlMode.EXPLICIT)
    assert started(catalog, explicit, 1)[0] == logging.WARNING
    catalog.list_not_loaded("a", [1])
    level, text = started(catalog, explicit, 1)
    assert level == logging.INFO
    assert "try `thirdrail load MODEL`" in text


def test_a_slow_start_says_what_it_waits_for(catalog: Catalog) -> None:
    catalog.expect(["a", "b", "c"])
    serve(catalog, "b")
    assert still_loading(catalog) == "still loading: a, c"
    serve(catalog, "a", "c")
    assert still_loading(catalog) == "waiting for the worker to start"


def test_many_names_are_shortened() -> None:
    assert shortened(list("abcde")) == "a, b, c, d, e"
    assert shortened(list("abcdefg")) == "a, b, c, d, e and 2 more"
