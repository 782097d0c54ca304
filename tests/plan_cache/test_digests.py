# SPDX-License-Identifier: Apache-2.0
"""Files are read once for several looks, and again when they changed."""

import os
from pathlib import Path

import pytest

from thirdrail_engines import ModelFileError
from thirdrail_engines.plan_cache import KnownDigests, digest_of, digests


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is read, in order."""
    done: list[Path] = []

    def noted(path: Path) -> str:
        done.append(path)
        return digest_of(path)

    monkeypatch.setattr(digests, "digest_of", noted)
    return done


def test_a_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    known = KnownDigests()
    assert [known(one), known(other), known(one), known(other)] == 2 * [
        digest_of(one),
        digest_of(other),
    ]
    assert reads == [one, other]


def test_a_file_that_changed_is_read_again(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    known = KnownDigests()
    known(path)
    path.write_bytes(b"new")
    os.utime(path, ns=(0, 0))  # a time of its own, however fast this is
    assert known(path) == digest_of(path)
    (tmp_path / "next").write_bytes(b"new")
    os.utime(tmp_path / "next", ns=(0, 0))
    (tmp_path / "next").rename(path)  # another file with the same time and size
    assert known(path) == digest_of(path)
    assert reads == 3 * [path]


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    known = KnownDigests()
    known(path)
    path.unlink()
    with pytest.raises(ModelFileError, match=r"cannot read .*model\.onnx: no such file"):
        known(path)
