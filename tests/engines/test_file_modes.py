# SPDX-License-Identifier: Apache-2.0
"""What lies at a path, where there are links, and where nobody may look."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from thirdrail_engines.file_modes import is_file, is_folder, is_there

NOBODY = 65534


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.write_bytes(b""), (True, True, False)),
        (lambda path: path.mkdir(), (True, False, True)),
        (lambda path: os.mkfifo(path), (True, False, False)),
        (lambda path: path.symlink_to(__file__), (True, True, False)),
        (lambda path: path.symlink_to("nothing"), (False, False, False)),
        (lambda path: path.symlink_to(path), (False, False, False)),
        (lambda path: None, (False, False, False)),
    ],
    ids=["file", "folder", "pipe", "link", "dangling link", "loop", "nothing"],
)
def test_says_what_is_there(
    make: Callable[[Path], object], expected: tuple[bool, bool, bool], tmp_path: Path
) -> None:
    path = tmp_path / "it"
    make(path)
    assert (is_there(path), is_file(path), is_folder(path)) == expected


def test_a_file_is_no_folder_of_files() -> None:
    assert not is_there(Path(__file__) / "model.onnx")


@pytest.mark.parametrize("ask", [is_there, is_file, is_folder])
def test_does_not_take_no_permission_for_nothing(
    ask: Callable[[Path], bool], tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").touch()
    tmp_path.chmod(0)
    owner = os.geteuid()
    if owner == 0:  # whom modes do not stop
        os.seteuid(NOBODY)
    try:
        with pytest.raises(PermissionError):
            ask(tmp_path / "model.onnx")
    finally:
        os.seteuid(owner)
        tmp_path.chmod(0o700)
