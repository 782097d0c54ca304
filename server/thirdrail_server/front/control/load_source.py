# SPDX-License-Identifier: Apache-2.0
"""Where a model is loaded from, and the worker's command that follows from what lies there."""

from dataclasses import dataclass
from pathlib import Path

from thirdrail_server.control_messages import LoadCommand
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.fields import check_fields
from thirdrail_server.repository.layout import ModelFolder, find, model_file
from thirdrail_server.repository.model_config import read_config
from thirdrail_server.repository.paths import reason_of
from thirdrail_server.repository.sizes import files_bytes
from thirdrail_server.repository.versions import chosen, missing


class ModelMissing(RepositoryError):
    """The repository has no folder of that name."""


@dataclass(frozen=True, slots=True)
class LoadSource:
    repository: Path
    config: ModelConfig | None = None  # in place of the repository's config.pbtxt


@dataclass(frozen=True, slots=True)
class PreparedLoad:
    command: LoadCommand
    failures: dict[int, str]  # versions that were chosen but have nothing that can be loaded
    files_bytes: int  # of all that the chosen versions have


def prepare(name: str, source: LoadSource) -> PreparedLoad:
    """Read the model's folder and configuration. Blocks on the file system.

    Raises RepositoryError when there is no such folder, it is broken, or no version can be loaded.
    """
    folder = find(source.repository, name)
    if folder is None:
        raise ModelMissing(f"the repository has no folder '{name}'")
    if folder.problem is not None:
        raise RepositoryError(folder.problem)
    config = source.config if source.config is not None else read_config(folder)
    if config is not None:
        check_fields(config)  # first: a model of a kind that is not served may have no model file
    policy = (config or ModelConfig()).version_policy
    filename = config.default_model_filename if config is not None else ""
    failures = dict.fromkeys(
        missing(policy, folder.versions), "version_policy names it, but it has no folder"
    )
    versions: list[tuple[int, Path]] = []
    for version in chosen(policy, folder.versions):
        _look(folder, version, filename, versions, failures)
    if not versions:
        texts = (f"version {version}: {text}" for version, text in sorted(failures.items()))
        raise RepositoryError("; ".join(texts) or "version_policy chooses none of its versions")
    size = sum(files_bytes(path.parent) for _version, path in versions)
    return PreparedLoad(LoadCommand(name, config, tuple(versions)), failures, size)


def _look(
    folder: ModelFolder,
    version: int,
    filename: str,
    versions: list[tuple[int, Path]],
    failures: dict[int, str],
) -> None:
    try:
        versions.append((version, model_file(folder, version, filename)))
    except RepositoryError as error:
        failures[version] = str(error)
    except OSError as error:
        failures[version] = f"the model file cannot be read: {reason_of(error)}"
