# SPDX-License-Identifier: Apache-2.0
"""Version policies."""

import pytest
from google.protobuf import text_format

from thirdrail_server.inference.grpc_service_pb2 import ModelVersionPolicy
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.versions import chosen, missing


def policy(text: str) -> ModelVersionPolicy:
    return text_format.Parse(text, ModelVersionPolicy())


@pytest.mark.parametrize(
    ("text", "available", "expected", "absent"),
    [
        ("", [1, 10, 9], [10], []),
        ("", [], [], []),
        ("latest {}", [1, 2], [2], []),
        ("latest { num_versions: 2 }", [1, 10, 9], [9, 10], []),
        ("latest { num_versions: 4294967295 }", [2, 1], [1, 2], []),
        ("all {}", [3, 1, 2], [1, 2, 3], []),
        ("specific { versions: [3, 1] }", [1, 2, 3], [1, 3], []),
        ("specific { versions: [3, 1, 7, 7] }", [1, 2], [1], [3, 7]),
        ("specific { versions: 5 }", [1], [], [5]),
    ],
)
def test_chosen_and_missing(
    text: str, available: list[int], expected: list[int], absent: list[int]
) -> None:
    assert chosen(policy(text), available) == expected
    assert missing(policy(text), available) == absent


@pytest.mark.parametrize("versions", ["", "versions: [1, 0]", "versions: -1"])
def test_versions_that_no_folder_can_have(versions: str) -> None:
    with pytest.raises(RepositoryError, match="needs version numbers above 0, got"):
        chosen(policy(f"specific {{ {versions} }}"), [1])
