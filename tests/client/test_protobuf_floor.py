# SPDX-License-Identifier: Apache-2.0
"""A protobuf that is too old is told in one line, by the command and by the package."""

import re
import tomllib
from pathlib import Path

import pytest
from google.protobuf.runtime_version import (
    Domain,
    ValidateProtobufRuntimeVersion,
    VersionError,
)

from thirdrail import cli, protobuf_floor
from thirdrail.v1 import tensor_pb2

WHAT_TO_DO = (
    "Install it with: pip install 'protobuf>={}' (`pip check` then names what wants an older"
)


def version_error(major: int) -> VersionError:
    """What protobuf says of generated code of that version."""
    with pytest.raises(VersionError) as caught:
        ValidateProtobufRuntimeVersion(Domain.PUBLIC, major, 1, 0, "", "other/other.proto")
    return caught.value


@pytest.mark.parametrize("installed", ["3.20.3", "4.25.9", "5.28.3"])
def test_our_own_stubs_need_their_floor(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(protobuf_floor, "installed", installed)
    text = f"thirdrail needs protobuf 5.29.0 or newer, and {installed} is installed. "
    with pytest.raises(ImportError, match=re.escape(text + WHAT_TO_DO.format("5.29.0"))):
        protobuf_floor.require_floor()


@pytest.mark.parametrize("installed", ["5.29.0", "5.29.6", "6.31.1rc1", "10.0"])
def test_what_is_new_enough_is_taken(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(protobuf_floor, "installed", installed)
    protobuf_floor.require_floor()


def test_the_floor_is_that_of_the_stubs_and_of_the_package() -> None:
    numbers = re.search(
        r"PUBLIC,\s+(\d+),\s+(\d+),\s+(\d+),", Path(tensor_pb2.__file__).read_text()
    )
    assert numbers is not None
    assert ".".join(numbers.groups()) == protobuf_floor.FLOOR
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    floor = protobuf_floor.FLOOR.removesuffix(".0")
    assert f"protobuf>={floor}" in project["project"]["dependencies"]


def test_the_command_says_whose_stubs_need_a_newer_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise version_error(99)

    monkeypatch.setattr(cli, "_main", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.EXIT_USAGE
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: other/other.proto needs protobuf 99.1.0 or newer, and ")
    assert WHAT_TO_DO.format("99.1.0") in line


def test_other_faults_are_not_explained_away() -> None:
    assert protobuf_floor.too_old(ValueError("loading x: gencode 9 runtime 8.")) is None
    assert protobuf_floor.too_old(VersionError("Invalid gencode version: -1.0.0")) is None
