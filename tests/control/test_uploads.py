# SPDX-License-Identifier: Apache-2.0
"""Uploaded files stay in their folder, are of harmless kinds, bounded, and removed in the end."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from thirdrail.errors import InvalidArgument, ResourceExhausted
from thirdrail_server.front.control import uploads
from thirdrail_server.front.control.uploads import Uploads


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


def test_what_a_killed_server_left_is_removed_and_what_a_living_one_has_is_not(
    temporary: Path, store: Uploads
) -> None:
    living = Uploads(files_max=3, bytes_max=100)
    kept = living.store("m", {"1/model.onnx": b"graph"})
    abandoned = temporary / f"{uploads.PREFIX}of-somebody"
    (abandoned / "folder").mkdir(parents=True)
    store.store("m", {"1/model.onnx": b"graph"})
    assert not abandoned.exists()
    assert kept.exists()
    living.close()
