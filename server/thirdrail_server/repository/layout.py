# SPDX-License-Identifier: Apache-2.0
"""What lies in a repository: NAME/VERSION/model.onnx (or .pt2, .pt, .plan), and NAME/config.pbtxt
where it exists.

A model that cannot be served is listed with its problem, so that it stops no other one and
everybody can see why. Hidden entries (a leading dot) and plain files beside the model folders are
no models.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from thirdrail_engines.file_modes import is_file, is_folder, is_there
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.paths import (
    reason_of,
    refuse_open_to_all,
    relative_parts,
    resolve_inside,
)

CONFIG_FILENAME = "config.pbtxt"
MODEL_FILENAME = "model.onnx"
# In the order in which they are looked for: a plan is the last, since it can be made anew.
MODEL_FILENAMES = (MODEL_FILENAME, "model.pt2", "model.pt", "model.plan")
MODELS_MAX = 10_000
VERSIONS_MAX = 10_000  # entries of one model folder
NAME_CHARS_MAX = 128

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@:-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,18}")
_VERSION_MAX = (1 << 63) - 1

# Told apart from "no such file", so that their owner learns that we know them but do not run them.
_NOT_SERVED = {".py": "models written in Python"}
NOT_SERVED = "not served by this version of Thirdrail"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One model of a repository. Paths are real ones, inside `root`."""

    name: str
    root: Path
    path: Path
    versions: tuple[int, ...]  # ascending
    config_path: Path | None
    problem: str | None  # why nothing of it can be served; the other fields are then best effort


def scan(repository: Path) -> dict[str, ModelFolder]:
    """The models of a repository by name, in order of their names.

    Raises RepositoryError when the repository itself is missing, unreadable, no folder, or may be
    written by everybody.
    """
    try:
        root = Path(os.path.realpath(repository, strict=True))
        refuse_open_to_all(root, "the model repository")
        entries = _entries(root, MODELS_MAX)
    except OSError as error:
        raise _unreadable(repository, error) from None
    folders = (_model_folder(root, entry.name) for entry in entries if _is_candidate(entry))
    return {folder.name: folder for folder in folders}


def find(repository: Path, name: str) -> ModelFolder | None:
    """The model that `scan` has by this name, without a look at all the others.

    Raises RepositoryError as `scan` does.
    """
    if len(name) > NAME_CHARS_MAX or not _NAME.fullmatch(name):  # no model's, but maybe a folder's
        return scan(repository).get(name)
    try:
        root = Path(os.path.realpath(repository, strict=True))
        os.scandir(root).close()
        path = root / name
        is_candidate = is_folder(path) or (path.is_symlink() and not is_there(path))
    except OSError as error:
        raise _unreadable(repository, error) from None
    return _model_folder(root, name) if is_candidate else None


def _unreadable(repository: Path, error: OSError) -> RepositoryError:
    return RepositoryError(f"the model repository '{repository}' cannot be read: {error.strerror}")


def model_file(folder: ModelFolder, version: int, filename: str = "") -> Path:
    """The path of a version's model file; `filename` is its `default_model_filename`.

    Symlinks are checked but not resolved: external data lies beside the link, and the model's
    folder is always `path.parent.parent`.
    Raises RepositoryError when there is none, it lies outside the repository, or is of a kind not
    served; OSError when it cannot be read, or goes while we look.
    """
    what = "the model file"
    within = folder.path / str(version)
    resolve_inside(folder.root, folder.path, str(version), what)
    wanted = filename or MODEL_FILENAME
    present = wanted if filename else _present(within) or wanted
    if len(relative_parts(present, what)) > 1:
        raise RepositoryError(f"{what} must lie in the version's folder itself, got '{present}'")
    kind = _NOT_SERVED.get(Path(present).suffix)
    if kind is not None:
        raise RepositoryError(f"{what} '{present}': {kind} are {NOT_SERVED}")
    if not filename and not os.path.lexists(within / present):
        raise RepositoryError(f"{what} '{present}' does not exist{_alternatives(within)}")
    real = resolve_inside(folder.root, within, present, what)
    if not is_file(real):
        raise RepositoryError(f"{what} '{present}' is not a regular file")
    refuse_open_to_all(within, "the version's folder")
    refuse_open_to_all(real, what)
    return within / present


def _present(version_folder: Path) -> str | None:
    names = (*MODEL_FILENAMES, *(f"model{suffix}" for suffix in _NOT_SERVED))
    return next((name for name in names if is_there(version_folder / name)), None)


def _alternatives(version_folder: Path) -> str:
    other = next(version_folder.glob("*.onnx"), None)
    if other is None:
        return ""
    return f"; rename {other.name!a}, or name it in config.pbtxt as default_model_filename"


def _entries(folder: Path, entries_max: int) -> list[os.DirEntry[str]]:
    entries: list[os.DirEntry[str]] = []
    with os.scandir(folder) as listing:
        for entry in listing:
            if len(entries) == entries_max:
                raise RepositoryError(f"'{folder.name}' has more than {entries_max} entries")
            entries.append(entry)
    return sorted(entries, key=lambda entry: entry.name)


def _is_candidate(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith("."):
        return False
    try:
        # A dangling symlink is somebody's model that went missing, which must not pass in silence.
        return entry.is_dir() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # e.g. a loop of symlinks
        return True


def _model_folder(root: Path, entry: str) -> ModelFolder:
    # Injective, and printable whatever the file system's bytes are.
    name = entry if entry.isascii() and entry.isprintable() else ascii(entry)
    broken = ModelFolder(name, root, root / entry, (), None, None)
    try:
        _check_name(entry)
        path = resolve_inside(root, root, entry, "the model folder")
        refuse_open_to_all(path, "the model folder")
        entries = _entries(path, VERSIONS_MAX)
        folder = ModelFolder(name, root, path, _versions(entries), _config_path(root, path), None)
        return _with_problem(folder, None if folder.versions else _no_version(name, entries))
    except RepositoryError as error:
        return _with_problem(broken, str(error))
    except (OSError, ValueError) as error:
        return _with_problem(
            broken, f"the model folder '{name}' cannot be read: {reason_of(error)}"
        )


def _with_problem(folder: ModelFolder, problem: str | None) -> ModelFolder:
    return ModelFolder(
        folder.name, folder.root, folder.path, folder.versions, folder.config_path, problem
    )


def _check_name(name: str) -> None:
    if len(name) > NAME_CHARS_MAX or not _NAME.fullmatch(name):
        raise RepositoryError(
            f"a model's name must be 1 to {NAME_CHARS_MAX} ASCII letters, digits or _ - . + @ :, "
            f"beginning with a letter, a digit or _, got {name!a}"
        )


def _versions(entries: list[os.DirEntry[str]]) -> tuple[int, ...]:
    return tuple(sorted(_version_numbers(entries)))


def _version_numbers(entries: list[os.DirEntry[str]]) -> Iterator[int]:
    for entry in entries:
        # Symlinks count as they are: where they lead is judged per version, by model_file().
        if _VERSION.fullmatch(entry.name) and (entry.is_symlink() or entry.is_dir()):
            number = int(entry.name)
            if number <= _VERSION_MAX:
                yield number


def _config_path(root: Path, path: Path) -> Path | None:
    if not os.path.lexists(path / CONFIG_FILENAME):
        return None
    return resolve_inside(root, path, CONFIG_FILENAME, "the configuration")


def _no_version(name: str, entries: list[os.DirEntry[str]]) -> str:
    found = [ascii(entry.name) for entry in entries if not entry.name.startswith(".")][:5]
    text = (
        "no version folder: expected folders named 1, 2, ... without leading zeros, "
        f"found {', '.join(found) if found else 'nothing'}"
    )
    if not any(entry.name == MODEL_FILENAME for entry in entries):
        return text
    if _VERSION.fullmatch(name):
        return f"{text}; if this is a version of a model, serve the folder above the model's"
    return f"{text}; move '{MODEL_FILENAME}' to '{name}/1/{MODEL_FILENAME}'"
