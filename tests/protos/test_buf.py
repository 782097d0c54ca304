# SPDX-License-Identifier: Apache-2.0
"""`buf lint` of our protos, and `buf breaking` against those of the last release."""

import shutil
import subprocess
from pathlib import Path

import pytest

from support.environments import REPOSITORY_ROOT, node_environment, run

pytestmark = [pytest.mark.needs_node, pytest.mark.timeout(600)]

PROTOS = REPOSITORY_ROOT / "protos"
NODE = REPOSITORY_ROOT / "tests" / "foreign" / "node"


def buf(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = node_environment("node", NODE) / "node_modules" / ".bin" / "buf"
    return run([str(program), *arguments])


def breaking(current: Path, against: Path) -> subprocess.CompletedProcess[str]:
    return buf("breaking", str(current), "--against", str(against))


def copy_of(protos: Path, folder: Path) -> Path:
    return shutil.copytree(protos, folder / "protos")


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_lint() -> None:
    done = buf("lint", str(PROTOS))
    assert done.returncode == 0, done.stdout


def test_lint_sees_a_bad_name(tmp_path: Path) -> None:
    protos = copy_of(PROTOS, tmp_path)
    edit(protos / "thirdrail" / "v1" / "inference.proto", "request_id = 5", "requestId = 5")
    done = buf("lint", str(protos))
    assert done.returncode != 0
    assert "request_id" in done.stdout


def test_nothing_broken_since_the_last_release(tmp_path: Path) -> None:
    done = breaking(PROTOS, last_release(tmp_path))
    assert done.returncode == 0, done.stdout


def last_release(folder: Path) -> Path:
    """The protos of the newest release tag; before the first release, those of the last commit."""
    git = ["git", "-C", str(REPOSITORY_ROOT)]
    tags = run([*git, "tag", "--list", "v[0-9]*", "--sort=-version:refname"]).stdout.split()
    archive = folder / "protos.tar"
    release = tags[0] if tags else "HEAD"
    done = run([*git, "archive", f"--output={archive}", release, "protos"])
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(archive, folder, filter="data")
    return folder / "protos"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("string request_id = 5;", "string request_id = 15;"),
        ("uint64 timeout_us = 10;", "string timeout_us = 10;"),
        ("rpc Infer(InferRequest) returns (InferResponse);", ""),
    ],
    ids=["renumbered", "retyped", "removed"],
)
def test_a_break_is_seen(tmp_path: Path, old: str, new: str) -> None:
    changed = copy_of(PROTOS, tmp_path)
    edit(changed / "thirdrail" / "v1" / "inference.proto", old, new)
    done = breaking(changed, PROTOS)
    assert done.returncode != 0
    assert "inference.proto" in done.stdout


def test_an_addition_is_no_break(tmp_path: Path) -> None:
    changed = copy_of(PROTOS, tmp_path)
    edit(
        changed / "thirdrail" / "v1" / "inference.proto",
        "message Cancel {",
        "message Cancel {\n  string note = 2;",
    )
    done = breaking(changed, PROTOS)
    assert done.returncode == 0, done.stdout
