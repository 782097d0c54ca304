# SPDX-License-Identifier: Apache-2.0
"""A model folder -> what a worker is told to load: the one way from files to a checked order."""

from dataclasses import dataclass
from pathlib import Path

from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.errors import RepositoryError, blaming
from thirdrail_server.repository.fields import check_fields
from thirdrail_server.repository.layout import ModelFolder, model_file
from thirdrail_server.repository.model_config import read_config
from thirdrail_server.repository.versions import chosen, missing


@dataclass(frozen=True, slots=True)
class ModelToLoad:
    """A model whose configuration can be served, as far as can be told without its engine."""

    name: str
    config: ModelConfig | None  # None: there is none, all is read from the model file
    versions: tuple[tuple[int, Path], ...]  # ascending number, its model file
    broken: dict[int, str]  # versions that the policy asks for and that cannot be loaded: why
    warnings: tuple[str, ...]


def read_model(folder: ModelFolder, override: ModelConfig | None = None) -> ModelToLoad:
    """Read the configuration, or take `override` in its place, and find the versions' files.

    Raises RepositoryError when nothing of the model can be loaded.
    """
    if folder.problem is not None:
        raise RepositoryError(f"model '{folder.name}': {folder.problem}")
    config = override if override is not None else read_config(folder)
    warnings = check_fields(config) if config is not None else ()
    with blaming(folder.name):
        files, broken = _files(folder, config if config is not None else ModelConfig())
    if not files:
        reasons = "; ".join(dict.fromkeys(broken.values())) or "the version policy chooses none"
        raise RepositoryError(f"model '{folder.name}': no version is available: {reasons}")
    return ModelToLoad(folder.name, config, tuple(files.items()), broken, warnings)


def _files(folder: ModelFolder, config: ModelConfig) -> tuple[dict[int, Path], dict[int, str]]:
    files: dict[int, Path] = {}
    broken = {
        version: f"version {version} has no folder"
        for version in missing(config.version_policy, folder.versions)
    }
    for version in chosen(config.version_policy, folder.versions):
        try:
            files[version] = model_file(folder, version, config.default_model_filename)
        except RepositoryError as error:
            broken[version] = str(error)
    return files, dict(sorted(broken.items()))
