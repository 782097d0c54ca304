# SPDX-License-Identifier: Apache-2.0
"""What lies in the repository, and which of it a server starts with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thirdrail_server.config import ModelControlMode, ServerConfig
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.fingerprint import Fingerprint, snapshot
from thirdrail_server.repository.layout import ModelFolder, scan


@dataclass(frozen=True, slots=True)
class Look:
    """At one moment. By model."""

    folders: dict[str, ModelFolder]
    prints: dict[str, Fingerprint]


def look(repository: Path) -> Look:
    """Raises RepositoryError when it cannot be read."""
    folders = scan(repository)
    return Look(folders, snapshot(folders))


def startup_names(config: ServerConfig, folders: Mapping[str, ModelFolder]) -> list[str]:
    """Raises RepositoryError when a model is wanted that is not there."""
    wanted = config.load_models
    if config.model_control is not ModelControlMode.EXPLICIT or "*" in wanted:
        return list(folders)
    for name in wanted:
        if name not in folders:
            raise RepositoryError(
                f"the model repository '{config.repository}' has no model '{name}' to load at the "
                "start (--load-model)"
            )
    return list(dict.fromkeys(wanted))
