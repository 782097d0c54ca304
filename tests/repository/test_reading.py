# SPDX-License-Identifier: Apache-2.0
"""From a model folder to what a worker is told to load."""

from typing import Any

import pytest

from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.model_config import parse_json
from thirdrail_server.repository.reading import read_model


def test_without_a_configuration_the_highest_version_is_loaded(repository: Any) -> None:
    repository.write("m/1/model.onnx")
    path = repository.write("m/2/model.onnx")
    model = read_model(repository.model("m"))
    assert (model.name, model.config, model.versions) == ("m", None, ((2, path),))
    assert (model.broken, model.warnings) == ({}, ())


def test_the_configuration_chooses_versions_and_file(repository: Any) -> None:
    paths = [repository.write(f"m/{version}/a.onnx") for version in (1, 2)]
    repository.write(
        "m/config.pbtxt",
        "version_policy { all {} } default_model_filename: 'a.onnx' metric_tags { key: 'a' }",
    )
    model = read_model(repository.model("m"))
    assert model.versions == ((1, paths[0]), (2, paths[1]))
    assert [warning.split(":")[0] for warning in model.warnings] == ["metric_tags is ignored"]


def test_an_override_stands_in_for_the_file(repository: Any) -> None:
    repository.write("m/1/model.onnx")
    repository.write("m/2/model.onnx")
    repository.write("m/config.pbtxt", "this does not parse")
    override = parse_json(b'{"version_policy": {"specific": {"versions": ["1"]}}}', "m")
    assert [version for version, _ in read_model(repository.model("m"), override).versions] == [1]
    assert [v for v, _ in read_model(repository.model("m"), ModelConfig()).versions] == [2]


def test_a_broken_version_leaves_the_others(repository: Any) -> None:
    repository.write("m/1/model.onnx")
    repository.write("m/2/model.plan")
    repository.write("m/config.pbtxt", "version_policy { specific { versions: [1, 2, 3] } }")
    model = read_model(repository.model("m"))
    assert [version for version, _ in model.versions] == [1]
    assert list(model.broken) == [2, 3]
    assert "TensorRT plans are not served" in model.broken[2]
    assert model.broken[3] == "version 3 has no folder"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"m/README": ""}, "model 'm': no version folder"),
        ({"m/1/model.py": ""}, "no version is available: .*models written in Python are not"),
        (
            {"m/1/model.onnx": "", "m/config.pbtxt": "version_policy { specific { versions: 2 } }"},
            "model 'm': no version is available: version 2 has no folder",
        ),
        ({"m/1/model.onnx": "", "m/config.pbtxt": "x"}, "m/config.pbtxt: line 1, column"),
        (
            {"m/1/model.onnx": "", "m/config.pbtxt": "ensemble_scheduling {}"},
            "ensembles are not served by this version of Thirdrail",
        ),
        (
            {"m/1/model.onnx": "", "m/config.pbtxt": "version_policy { specific {} }"},
            "model 'm': version_policy.specific needs version numbers above 0",
        ),
    ],
)
def test_nothing_to_load_is_an_error(repository: Any, files: dict[str, str], expected: str) -> None:
    for path, text in files.items():
        repository.write(path, text)
    with pytest.raises(RepositoryError, match=expected):
        read_model(repository.model("m"))
