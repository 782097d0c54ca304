# SPDX-License-Identifier: Apache-2.0
"""A repository on disk to be filled by tests."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from thirdrail_server.repository.layout import ModelFolder, scan


@dataclass(frozen=True)
class Repository:
    root: Path

    def write(self, relative: str, data: bytes | str = b"model") -> Path:
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def model(self, name: str) -> ModelFolder:
        return scan(self.root)[name]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    root = tmp_path / "repository"
    root.mkdir()
    return Repository(root)
