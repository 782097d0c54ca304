# SPDX-License-Identifier: Apache-2.0
"""Scanning a repository: what is a model, what is a version, and that one folder stops no other."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from thirdrail_server.repository import layout
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.layout import find, model_file, scan


def test_finds_models_with_their_versions_in_numerical_order(repository: Any) -> None:
    for version in (10, 9, 1):
        repository.write(f"m/{version}/model.onnx")
    repository.write("a/1/model.onnx")
    repository.write("a/config.pbtxt", "max_batch_size: 1")
    models = scan(repository.root)
    assert list(models) == ["a", "m"]
    assert models["m"].versions == (1, 9, 10)
    assert models["m"].config_path is None
    assert models["a"].config_path == repository.root / "a/config.pbtxt"
    assert [folder.problem for folder in models.values()] == [None, None]


def test_hidden_folders_and_plain_files_are_no_models(repository: Any) -> None:
    repository.write(".git/1/model.onnx")
    repository.write("README.md", "about")
    assert scan(repository.root) == {}


@pytest.mark.parametrize("folder", ["0", "01", "-1", "1a", "v2", "9" * 20, "٣", str(1 << 63)])
def test_other_folders_are_no_versions(repository: Any, folder: str) -> None:
    repository.write(f"m/{folder}/model.onnx")
    assert repository.model("m").versions == ()
    assert "no version folder" in repository.model("m").problem
    repository.write("m/2/model.onnx")
    assert repository.model("m").versions == (2,)
    assert repository.model("m").problem is None


def test_a_file_named_like_a_version_is_none(repository: Any) -> None:
    repository.write("m/1", "a file")
    assert "no version folder" in repository.model("m").problem
    assert "'1'" in repository.model("m").problem


@pytest.mark.parametrize("name", ["a b", "a\nb", "é", "-x", "a'b", "x" * 129, "a\\b"])
def test_an_illegal_name_is_a_problem_of_that_folder_alone(repository: Any, name: str) -> None:
    repository.write(f"{name}/1/model.onnx")
    repository.write("good/1/model.onnx")
    models = scan(repository.root)
    assert models.pop("good").problem is None
    [broken] = models.values()
    assert broken.problem is not None
    assert "name must be" in broken.problem
    assert broken.name.isprintable()


def test_a_name_that_is_no_utf8_is_listed_in_printable_form(repository: Any) -> None:
    os.makedirs(os.fsencode(repository.root) + b"/\xff\xfe/1")
    [(name, folder)] = scan(repository.root).items()
    assert name.isascii()
    assert name.isprintable()
    assert folder.problem is not None
    name.encode()  # fit for a message


@pytest.mark.parametrize("name", ["a", "Model_1.5-x", "a@b", "a:b", "x" * 128, "1", "_a"])
def test_legal_names(repository: Any, name: str) -> None:
    repository.write(f"{name}/1/model.onnx")
    assert repository.model(name).problem is None


def test_an_empty_model_folder_says_what_was_expected(repository: Any) -> None:
    (repository.root / "m").mkdir()
    assert repository.model("m").problem == (
        "no version folder: expected folders named 1, 2, ... without leading zeros, found nothing"
    )


def test_a_missing_repository_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"gone' cannot be read: No such file"):
        scan(tmp_path / "gone")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RepositoryError, match=r"file' cannot be read: Not a directory"):
        scan(tmp_path / "file")


def test_one_model_is_found_as_it_is_among_all(repository: Any) -> None:
    repository.write("good/3/model.onnx")
    repository.write("b c/1/model.onnx")
    repository.write("x" * 129 + "/1/model.onnx")
    repository.write("file")
    (repository.root / "empty").mkdir()
    (repository.root / "gone").symlink_to("nowhere")
    (repository.root / "loop").symlink_to("loop")
    (repository.root / "outside").symlink_to("/etc")
    os.mkfifo(repository.root / "pipe")
    models = scan(repository.root)
    assert len(models) == 7
    assert {name: find(repository.root, name) for name in models} == models
    for name in ("file", "pipe", "missing", ".", "..", "", "good/3", "y" * 300, "\0"):
        assert find(repository.root, name) is None


def test_a_model_of_a_missing_repository_is_not_just_missing(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"gone' cannot be read: No such file"):
        find(tmp_path / "gone", "m")


def test_the_number_of_entries_is_bounded(repository: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "VERSIONS_MAX", 2)
    for version in (1, 2, 3):
        repository.write(f"m/{version}/model.onnx")
    assert "more than 2 entries" in repository.model("m").problem
    monkeypatch.setattr(layout, "MODELS_MAX", 1)
    repository.write("n/1/model.onnx")
    with pytest.raises(RepositoryError, match="more than 1 entries"):
        scan(repository.root)


def test_model_file_by_default_and_by_name(repository: Any) -> None:
    default = repository.write("m/1/model.onnx")
    small = repository.write("m/1/small.onnx")
    folder = repository.model("m")
    assert model_file(folder, 1) == default
    assert model_file(folder, 1, "small.onnx") == small


def test_the_model_file_lies_in_the_version_folder_itself(repository: Any) -> None:
    repository.write("m/1/model.onnx/model.onnx")
    repository.write("m/1/sub/model.onnx")
    with pytest.raises(RepositoryError, match=r"'model.onnx' is not a regular file"):
        model_file(repository.model("m"), 1)
    with pytest.raises(RepositoryError, match="must lie in the version's folder itself"):
        model_file(repository.model("m"), 1, "sub/model.onnx")


def test_kinds_that_are_not_served_are_refused_by_name(repository: Any) -> None:
    repository.write("m/1/model.py")
    expected = "'model.py': models written in Python are not served by this version of Thirdrail"
    for name in ("", "model.py"):
        with pytest.raises(RepositoryError, match=expected):
            model_file(repository.model("m"), 1, name)


def test_sources_come_before_plans(repository: Any) -> None:
    for filename in ("model.plan", "model.pt", "model.pt2", "model.onnx"):
        written = repository.write(f"m/1/{filename}")
        assert model_file(repository.model("m"), 1) == written


@pytest.mark.parametrize("opened", ["", "m", "m/1", "m/1/model.onnx"])
def test_what_everybody_may_write_is_refused(repository: Any, opened: str) -> None:
    repository.write("m/1/model.onnx")
    path = repository.root / opened
    before = path.stat().st_mode
    path.chmod(before | 0o002)
    expected = re.escape(
        f"'{path}' may be written by every user of this host, who could so run code as the "
        f"server's user; take that away: chmod o-w {path}"
    )
    with pytest.raises(RepositoryError, match=expected):
        _served_file(repository)
    path.chmod(before)
    assert _served_file(repository) == repository.root / "m/1/model.onnx"


def _served_file(repository: Any) -> Path:
    folder = repository.model("m")
    if folder.problem is not None:
        raise RepositoryError(folder.problem)
    return model_file(folder, 1)


def test_a_missing_model_file_is_named_and_what_could_be_meant(repository: Any) -> None:
    repository.write("m/1/README", "")
    with pytest.raises(RepositoryError, match=r"the model file 'model.onnx' does not exist$"):
        model_file(repository.model("m"), 1)
    repository.write("m/1/net.onnx")
    with pytest.raises(RepositoryError, match=r"does not exist; rename 'net.onnx', or name it in"):
        model_file(repository.model("m"), 1)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("m", "found 'model.onnx'; move 'model.onnx' to 'm/1/model.onnx'"),
        ("1", "found 'model.onnx'; if this is a version of a model, serve the folder above the"),
    ],
)
def test_a_model_one_folder_too_high_or_too_low_is_told_so(
    repository: Any, name: str, advice: str
) -> None:
    repository.write(f"{name}/model.onnx")
    assert advice in repository.model(name).problem


def test_a_fifo_is_no_model_file(repository: Any) -> None:
    (repository.root / "m/1").mkdir(parents=True)
    os.mkfifo(repository.root / "m/1/model.onnx")
    with pytest.raises(RepositoryError, match="not a regular file"):
        model_file(repository.model("m"), 1)
