# SPDX-License-Identifier: Apache-2.0
"""Paths that try to leave the repository, by symlinks or by `..`, and files that never end."""

import os
from pathlib import Path
from typing import Any

import pytest

from support.open_files import open_files, opened_since
from thirdrail_server.inference.grpc_service_pb2 import (
    DataType,
    ModelConfig,
    ModelInput,
    ModelOutput,
)
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.fingerprint import fingerprint
from thirdrail_server.repository.labels import labels
from thirdrail_server.repository.layout import model_file, scan
from thirdrail_server.repository.model_config import CONFIG_BYTES_MAX, read_config
from thirdrail_server.repository.paths import read_bounded, relative_parts
from thirdrail_server.repository.warmup import warmup_requests

CLIMBING = ["..", "../x", "a/../../x", "/etc/passwd", "//etc/passwd", "./../x", "a/.."]
NO_PATHS = ["", ".", "/", "a\0b", "a\nb", "x" * 1025, "\ud800"]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "secret"
    path.parent.mkdir()
    path.write_text("secret")
    return path


@pytest.mark.parametrize("relative", CLIMBING + NO_PATHS)
def test_a_path_from_a_configuration_stays_inside(relative: str) -> None:
    with pytest.raises(RepositoryError, match="the file must be a"):
        relative_parts(relative, "the file")


def test_a_good_path_is_cut_into_its_parts() -> None:
    assert relative_parts("./1//model..onnx", "the file") == ("1", "model..onnx")


@pytest.mark.parametrize("relative", CLIMBING)
def test_default_model_filename_cannot_climb(repository: Any, secret: Path, relative: str) -> None:
    repository.write("m/1/model.onnx")
    with pytest.raises(RepositoryError, match="inside the model's folder"):
        model_file(repository.model("m"), 1, relative)


def test_symlinks_out_of_the_repository_are_refused(repository: Any, secret: Path) -> None:
    repository.write("file/1/other.onnx")
    (repository.root / "file/1/model.onnx").symlink_to(secret)
    (repository.root / "version").mkdir()
    (repository.root / "version/1").symlink_to(secret.parent)
    for name in ("file", "version"):
        with pytest.raises(RepositoryError, match="leads out of the folder 'repository'"):
            model_file(repository.model(name), 1)


def test_a_model_folder_that_leads_out_is_a_problem_of_its_own(
    repository: Any, secret: Path
) -> None:
    repository.write("good/1/model.onnx")
    (repository.root / "bad").symlink_to(secret.parent)
    assert scan(repository.root)["good"].problem is None
    assert "leads out of the folder 'repository'" in repository.model("bad").problem


def test_a_configuration_that_leads_out_is_a_problem(repository: Any, secret: Path) -> None:
    repository.write("m/1/model.onnx")
    (repository.root / "m/config.pbtxt").symlink_to(secret)
    assert "leads out of the folder 'repository'" in repository.model("m").problem


def test_symlinks_inside_the_repository_are_followed(repository: Any) -> None:
    repository.write("..data/first/model.onnx")
    (repository.root / "m").mkdir()
    (repository.root / "m/1").symlink_to("../..data/first")
    path = model_file(repository.model("m"), 1)
    assert path.read_bytes() == b"model"
    assert path.parent.parent == repository.root / "m"


def test_the_repository_itself_may_be_a_symlink(repository: Any, tmp_path: Path) -> None:
    path = repository.write("m/1/model.onnx")
    (tmp_path / "link").symlink_to(repository.root)
    assert model_file(scan(tmp_path / "link")["m"], 1) == path


def test_loops_and_dangling_links_are_problems_not_crashes(repository: Any) -> None:
    repository.write("good/1/model.onnx")
    (repository.root / "dangling").symlink_to("nowhere")
    (repository.root / "loop").symlink_to("loop")
    models = scan(repository.root)
    assert {name for name, folder in models.items() if folder.problem} == {"dangling", "loop"}


def test_label_files_stay_inside_the_model_folder(repository: Any, secret: Path) -> None:
    repository.write("m/1/model.onnx")
    repository.write("other/labels.txt", "theirs")
    (repository.root / "m/link.txt").symlink_to(secret)
    (repository.root / "m/neighbour.txt").symlink_to("../other/labels.txt")
    for filename in (*CLIMBING, "../other/labels.txt", "link.txt", "neighbour.txt"):
        config = ModelConfig(output=[ModelOutput(name="y", label_filename=filename)])
        with pytest.raises(RepositoryError, match=r"output 'y'"):
            labels(config, repository.model("m").path)


def test_warm_up_files_stay_inside_the_model_folder(repository: Any, secret: Path) -> None:
    repository.write("m/1/model.onnx")
    repository.write("m/warmup/own", b"\0")
    repository.write("other/data", b"\0")
    (repository.root / "m/warmup/link").symlink_to(secret)
    (repository.root / "m/warmup/neighbour").symlink_to("../../other/data")
    config = ModelConfig(input=[ModelInput(name="x", data_type=DataType.TYPE_INT8)])
    source = config.model_warmup.add().inputs["x"]
    source.data_type = DataType.TYPE_INT8
    for filename in (*CLIMBING, "link", "neighbour"):
        source.input_data_file = filename
        with pytest.raises(RepositoryError, match=r"input 'x'.*(inside the model|leads out)"):
            warmup_requests(config, repository.model("m").path)
    source.input_data_file = "own"
    assert len(warmup_requests(config, repository.model("m").path)) == 1


def test_a_fingerprint_does_not_look_outside(repository: Any, secret: Path) -> None:
    repository.write("m/1/model.onnx")
    (repository.root / "m/out").symlink_to(secret.parent)
    assert [stamp[0] for stamp in fingerprint(repository.model("m"))] == [
        "1/",
        "1/model.onnx",
        "out/",
    ]


def test_a_fifo_as_configuration_does_not_hang(repository: Any) -> None:
    repository.write("m/1/model.onnx")
    os.mkfifo(repository.root / "m/config.pbtxt")
    with pytest.raises(RepositoryError, match="not a regular file"):
        read_config(repository.model("m"))


def test_an_endless_file_is_read_up_to_the_bound() -> None:
    with pytest.raises(RepositoryError, match="not a regular file"):
        read_bounded(Path("/dev/zero"), 10, "the file")


def test_a_large_configuration_is_refused_unread(repository: Any) -> None:
    repository.write("m/1/model.onnx")
    path = repository.write("m/config.pbtxt", "")
    os.truncate(path, 1 << 40)  # a sparse file; reading it whole would take all memory
    with pytest.raises(RepositoryError, match=f"larger than {CONFIG_BYTES_MAX} bytes"):
        read_config(repository.model("m"))


def test_read_bounded_at_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5, "the file") == b"12345"
    with pytest.raises(RepositoryError, match="the file is larger than 4 bytes"):
        read_bounded(path, 4, "the file")
    with pytest.raises(RepositoryError, match="the file cannot be read: No such file"):
        read_bounded(tmp_path / "gone", 4, "the file")


def test_a_refused_read_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = open_files()
    with pytest.raises(RepositoryError, match="the file is not a regular file"):
        read_bounded(tmp_path, 4, "the file")
    assert opened_since(before) == []
