# SPDX-License-Identifier: Apache-2.0
"""Environments of their own for other people's programs, below `.tools/` and never in `.venv`.

An environment is made once per list of requirements: its folder's name holds a hash of the list, so
a changed pin makes a new one and a second run finds the old one ready.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY_ROOT / ".tools"

_FINISHED = ".finished"
_STEP_S_MAX = 480


@dataclass(frozen=True, slots=True)
class PythonEnvironment:
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"


def python_environment(
    name: str, requirements: Sequence[str], *, dependencies: bool = True
) -> PythonEnvironment:
    """dependencies: False installs exactly the named packages."""

    def fill(folder: Path) -> None:
        _step([sys.executable, "-m", "venv", str(folder)])
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
        pip += ["--disable-pip-version-check", *(() if dependencies else ("--no-deps",))]
        _step([*pip, *requirements])

    facts = [sys.version, str(dependencies), *requirements]
    return PythonEnvironment(_made_once(name, facts, fill))


def node_environment(name: str, package: Path) -> Path:
    """The folder with `node_modules` as the package.json and lock file in `package` say."""
    files = ("package.json", "package-lock.json")

    def fill(folder: Path) -> None:
        folder.mkdir(parents=True)
        for file in files:
            shutil.copy(package / file, folder)
        # No install scripts: those of a registry package may fetch from anywhere. Not `npm ci`: it
        # wants the lock file to name the programs for every other platform too.
        install = ["npm", "install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund"]
        _step(install, cwd=folder)

    return _made_once(name, [(package / file).read_text() for file in files], fill)


def debian_packages(name: str, packages: Sequence[str]) -> Path:
    """The folder into which these Debian packages were unpacked, without installing them."""

    def fill(folder: Path) -> None:
        folder.mkdir(parents=True)
        if not _has_lists(packages):
            _step(["apt-get", "update", "-qq"])
        _step(["apt-get", "download", "-qq", *packages], cwd=folder)
        for archive in folder.glob("*.deb"):
            _step(["dpkg", "--extract", str(archive), str(folder)])

    return _made_once(name, packages, fill)


def requirements_in(path: Path) -> list[str]:
    """The lines of a requirements file, without its comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def client_dependencies() -> list[str]:
    """What installing thirdrail without extras brings along, floors as we declare them."""
    project = tomllib.loads((REPOSITORY_ROOT / "pyproject.toml").read_text())["project"]
    return [str(dependency) for dependency in project["dependencies"]]


def run(
    command: Sequence[str],
    variables: dict[str, str] | None = None,
    *,
    cwd: Path | None = None,
    timeout_s: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Any exit status comes back. Raises subprocess.TimeoutExpired."""
    return subprocess.run(
        command,
        env=os.environ | (variables or {}),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _made_once(name: str, facts: Sequence[str], fill: Callable[[Path], None]) -> Path:
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    folder = TOOLS / f"{name}-{key}"
    TOOLS.mkdir(exist_ok=True)
    with _locked(TOOLS / f"{name}.lock"):
        if not (folder / _FINISHED).exists():
            shutil.rmtree(folder, ignore_errors=True)  # left half made by a run that was killed
            fill(folder)
            (folder / _FINISHED).touch()
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _has_lists(packages: Sequence[str]) -> bool:
    return run(["apt-cache", "show", *packages]).returncode == 0


def _step(command: Sequence[str], cwd: Path | None = None) -> None:
    done = run(command, cwd=cwd, timeout_s=_STEP_S_MAX)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
