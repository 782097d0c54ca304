# SPDX-License-Identifier: Apache-2.0
"""From a model folder to the worker's load command, and its answer."""

from pathlib import Path
from typing import Any

import pytest

from thirdrail.errors import Internal
from thirdrail_server.control_messages import Fields, LoadedModel, VersionEngine
from thirdrail_server.front.control.load_source import LoadSource, ModelMissing, prepare
from thirdrail_server.front.control.worker_load import load_in_worker
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository import layout
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.model_config import parse_json
from thirdrail_server.repository.paths import refuse_open_to_all


def write(root: Path, files: dict[str, str]) -> LoadSource:
    for relative, text in files.items():
        path = root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return LoadSource(root)


def versions(source: LoadSource) -> list[int]:
    return [version for version, _path in prepare("m", source).command.versions]


def test_without_a_configuration_the_highest_version_is_loaded(tmp_path: Path) -> None:
    source = write(tmp_path, {"m/1/model.onnx": "", "m/2/model.onnx": ""})
    prepared = prepare("m", source)
    assert prepared.command.name == "m"
    assert prepared.command.config is None
    assert prepared.command.versions == ((2, tmp_path / "m/2/model.onnx"),)
    assert prepared.failures == {}


def test_the_configuration_chooses_versions_and_file(tmp_path: Path) -> None:
    config = "version_policy { all {} } default_model_filename: 'a.onnx'"
    source = write(tmp_path, {"m/1/a.onnx": "", "m/2/a.onnx": "", "m/config.pbtxt": config})
    command = prepare("m", source).command
    assert command.versions == ((1, tmp_path / "m/1/a.onnx"), (2, tmp_path / "m/2/a.onnx"))
    assert command.config is not None
    assert command.config.default_model_filename == "a.onnx"


def test_a_given_configuration_stands_in_for_the_file(tmp_path: Path) -> None:
    source = write(
        tmp_path, {"m/1/model.onnx": "", "m/2/model.onnx": "", "m/config.pbtxt": "no text format"}
    )
    first = parse_json(b'{"version_policy": {"specific": {"versions": ["1"]}}}', "m")
    assert versions(LoadSource(source.repository, first)) == [1]
    assert versions(LoadSource(source.repository, ModelConfig(name="m"))) == [2]


def test_a_version_that_goes_while_we_look_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path, {"m/1/model.onnx": "", "m/2/model.onnx": ""})
    check = refuse_open_to_all

    def check_what_is_gone(path: Path, what: str) -> None:
        check(path / "gone" if path.name == "2" else path, what)

    monkeypatch.setattr(layout, "refuse_open_to_all", check_what_is_gone)
    with pytest.raises(RepositoryError, match="version 2: the model file cannot be read: No such"):
        prepare("m", source)
    every = parse_json(b'{"version_policy": {"all": {}}}', "m")
    assert versions(LoadSource(source.repository, every)) == [1]


def test_a_broken_version_leaves_the_others(tmp_path: Path) -> None:
    config = "version_policy { specific { versions: [1, 2, 3] } }"
    source = write(tmp_path, {"m/1/model.onnx": "", "m/2/model.py": "", "m/config.pbtxt": config})
    assert versions(source) == [1]
    failures = prepare("m", source).failures
    assert sorted(failures) == [2, 3]
    assert "models written in Python are not served" in failures[2]
    assert "has no folder" in failures[3]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"m/README": ""}, "no version folder"),
        ({"m/1/model.py": ""}, "models written in Python are not served"),
        (
            {"m/1/model.onnx": "", "m/config.pbtxt": "version_policy { specific { versions: 2 } }"},
            "version 2: version_policy names it, but it has no folder",
        ),
        (
            {"m/1/model.onnx": "", "m/config.pbtxt": "version_policy { specific {} }"},
            "version_policy.specific needs version numbers above 0",
        ),
        ({"m/1/model.onnx": "", "m/config.pbtxt": "x"}, "m/config.pbtxt: line 1, column"),
    ],
)
def test_nothing_to_load_is_an_error(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    with pytest.raises(RepositoryError, match=expected):
        prepare("m", write(tmp_path, files))


@pytest.mark.parametrize("config", ["ensemble_scheduling {}", "backend: 'python'"])
def test_a_kind_that_is_not_served_is_named_although_it_has_no_model_file(
    tmp_path: Path, config: str
) -> None:
    source = write(tmp_path, {"m/1/.keep": "", "m/config.pbtxt": config})
    with pytest.raises(RepositoryError, match="not served by this version of Thirdrail"):
        prepare("m", source)


def test_a_name_without_a_folder_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="the repository has no folder 'm'"):
        prepare("m", LoadSource(tmp_path))


class AnsweringWorker:
    """Has loaded version 1, and says so much more of others."""

    def __init__(self, **more: dict[int, object]) -> None:
        answer = LoadedModel(ModelConfig(name="m"), {1: None}, {1: ["x"]}, [], {})
        for name, others in more.items():
            getattr(answer, name).update(others)
        self._answer = answer.to_fields()

    async def call(self, _do: str, _fields: Fields, _progress: object) -> Fields:
        return self._answer


@pytest.mark.parametrize(
    "more", [{"versions": {-1: None}}, {"in_place": {2: []}}, {"engines": {3: VersionEngine("e")}}]
)
async def test_an_answer_about_versions_that_nobody_asked_for_is_refused(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    prepared = prepare("m", write(tmp_path, {"m/1/model.onnx": ""}))
    honest: Any = AnsweringWorker()
    assert (await load_in_worker(honest, prepared, print)).ready_versions == [1]
    lying: Any = AnsweringWorker(**more)
    with pytest.raises(Internal, match="versions that it was not asked for"):
        await load_in_worker(lying, prepared, print)
