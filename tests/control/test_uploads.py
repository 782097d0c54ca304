# SPDX-License-Identifier: Apache-2.0
"""Uploaded files stay in their folder, are of harmless kinds, bounded, and removed in the end."""

import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from thirdrail.errors import InvalidArgument, ResourceExhausted
from thirdrail_server.front.control import uploads
from thirdrail_server.front.control.uploads import Uploads, remove_abandoned


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def store(temporary: Path) -> Iterator[Uploads]:
    store = Uploads(files_max=3, bytes_max=100)
    yield store
    store.close()
    assert not list(temporary.iterdir())


def test_files_lie_where_the_repository_layout_wants_them(store: Uploads, temporary: Path) -> None:
    files = {"1/model.onnx": b"graph", "1/weights/a.bin": b"w", "labels.txt": b"cat"}
    repository = store.store("m", files)
    for path, content in files.items():
        assert (repository / "m" / path).read_bytes() == content
    (root,) = temporary.iterdir()
    assert root.stat().st_mode & 0o077 == 0
    store.discard(repository)
    assert not repository.exists()


def test_discarding_anything_else_does_nothing(store: Uploads, temporary: Path) -> None:
    store.store("m", {"1/model.onnx": b"graph"})
    mine = temporary / "mine"
    mine.mkdir()
    store.discard(mine)
    mine.rmdir()


@pytest.mark.parametrize(
    "path",
    [
        "../model.onnx",
        "1/../../model.onnx",
        "/etc/model.onnx",
        "",
        "1/model.plan",
        "1/model.pt2",
        "1/model.py",
        "1/data.pkl",
        "1/model",
        "1/.onnx",
        "1/model.onnx/..",
        "1/mo\0del.onnx",
        "a/" * 9 + "model.onnx",
    ],
)
def test_other_paths_and_kinds_are_refused(store: Uploads, path: str) -> None:
    with pytest.raises(InvalidArgument):
        store.store("m", {path: b"x"})


@pytest.mark.parametrize("name", ["..", "a/b", "", "/"])
def test_a_name_that_is_no_folders_name_is_refused(store: Uploads, name: str) -> None:
    with pytest.raises(InvalidArgument):
        store.store(name, {"1/model.onnx": b"x"})


def test_two_files_of_one_place_are_refused(store: Uploads) -> None:
    for path in ("1/./model.onnx", "1/model.onnx/weights.bin"):
        with pytest.raises(InvalidArgument, match="has its place"):
            store.store("m", {"1/model.onnx": b"x", path: b"y"})


def test_count_and_size_are_bounded(store: Uploads) -> None:
    with pytest.raises(ResourceExhausted):
        store.store("m", {f"1/{number}.bin": b"x" for number in range(4)})
    with pytest.raises(ResourceExhausted):
        store.store("m", {"1/model.onnx": bytes(101)})


def test_a_name_that_no_file_can_have_is_refused(store: Uploads) -> None:
    for name, path in (("m", f"1/{'a' * 300}.onnx"), ("m" * 300, "1/model.onnx")):
        with pytest.raises(InvalidArgument, match="too long"):
            store.store(name, {path: b"x"})


def test_first_uploads_at_the_same_time_share_one_folder(store: Uploads, temporary: Path) -> None:
    together = threading.Barrier(4)

    def upload(_number: int) -> Path:
        together.wait()
        return store.store("m", {"1/model.onnx": b"graph"})

    with ThreadPoolExecutor(4) as threads:
        repositories = list(threads.map(upload, range(4)))
    assert len(list(temporary.iterdir())) == 1
    assert all(each.exists() for each in repositories)


def test_what_a_killed_server_left_is_removed_and_what_a_living_one_has_is_not(
    temporary: Path, store: Uploads
) -> None:
    kept = store.store("m", {"1/model.onnx": b"graph"})
    abandoned = temporary / f"{uploads.PREFIX}of-somebody"
    (abandoned / "folder").mkdir(parents=True)
    remove_abandoned()
    assert not abandoned.exists()
    assert kept.exists()


def test_a_folder_that_another_server_removes_before_it_is_ours_is_replaced(
    store: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = uploads._try_lock
    stolen: list[Path] = []

    def lock_too_late(folder: Path) -> int:
        if not stolen:
            stolen.append(folder)
            folder.rmdir()
        return lock(folder)

    monkeypatch.setattr(uploads, "_try_lock", lock_too_late)
    assert store.store("m", {"1/model.onnx": b"graph"}).exists()
    assert len(stolen) == 1
