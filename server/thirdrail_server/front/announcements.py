# SPDX-License-Identifier: Apache-2.0
"""What the log says about a start: where the server listens, what it serves, what to do next.

Pure texts: nothing is logged here.
"""

import logging
import shlex
from collections.abc import Sequence

from thirdrail.discovery import DEFAULT_HOST, DEFAULT_PORT, default_socket_path
from thirdrail_server.config import ModelControlMode, ServerConfig
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.control.served_model import LOADING

NAMES_SHOWN_MAX = 5

Announcement = tuple[int, str]  # the level of logging, and the text


def listening(config: ServerConfig, address: str | None) -> str:
    """address: that of TCP with its real port, None without TCP."""
    places = []
    if address is not None:
        places.append(f"{address} (TLS)" if config.tls else address)
    if config.socket is not None:
        places.append(f"unix:{config.socket}")
    return f"listening on {' and '.join(places)}"


def still_loading(catalog: Catalog) -> str:
    """For whoever wonders what a start takes so long for."""
    names = [
        model.name
        for model in catalog.models()
        if any(each.state == LOADING for each in model.versions)
    ]
    return f"still loading: {shortened(names)}" if names else "waiting for the worker to start"


def started(catalog: Catalog, config: ServerConfig, seconds: float) -> Announcement:
    """How the start went, once nothing is being loaded any more."""
    names = catalog.startup_names()
    failed = [name for name in names if not catalog.is_ready(name)]
    ready = len(names) - len(failed)
    if not names:
        return _without_models(catalog, config, seconds)
    if not failed:
        models = "1 model" if ready == 1 else f"{ready} models"
        return logging.INFO, f"ready after {seconds:.2f} s: {models}; see `{_listing(config)}`"
    text = (
        f"started after {seconds:.2f} s with {ready} of {len(names)} models; "
        f"not loaded: {shortened(failed)}; `{_listing(config)}` says why"
    )
    if config.strict_readiness:
        text += "; health says NOT_SERVING as long as one is missing, unless --ready-when is live"
    return logging.WARNING, text


def _without_models(catalog: Catalog, config: ServerConfig, seconds: float) -> Announcement:
    head = f"ready after {seconds:.2f} s, without a model"
    if config.model_control is ModelControlMode.EXPLICIT and catalog.models():
        return logging.INFO, f"{head}: none is loaded yet; try `thirdrail load MODEL`"
    wanted = "expected MODEL/VERSION/model.onnx, for example digits/1/model.onnx"
    return logging.WARNING, f"{head}: '{config.repository}' has no folder of a model, {wanted}"


def _listing(config: ServerConfig) -> str:
    """The command that lists the models of this server, whether or not clients find it alone."""
    if config.socket is not None:
        is_found, url = config.socket == default_socket_path(), f"unix:{config.socket}"
    else:
        is_found, url = config.address == f"{DEFAULT_HOST}:{DEFAULT_PORT}", config.address or ""
    return "thirdrail models" if is_found else f"thirdrail models --url {shlex.quote(url)}"


def shortened(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = len(names) - NAMES_SHOWN_MAX
    shown = ", ".join(names[:NAMES_SHOWN_MAX])
    return f"{shown} and {more} more" if more > 0 else shown
