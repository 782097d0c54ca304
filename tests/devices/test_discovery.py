# SPDX-License-Identifier: Apache-2.0
"""Finding devices through the real bindings, on a driver that was made for the purpose."""

from pathlib import Path
from typing import Any

import pytest

from cuda.stub_driver import run_on_stub, stub_folder
from thirdrail_engines.cuda.discovery import discover

__all__ = ["stub_folder"]


def needs_stub(test: Any) -> Any:
    return pytest.mark.needs_gcc(pytest.mark.needs_cuda_bindings(test))


FIND = """
from thirdrail_engines.cuda.discovery import discover

found, why_none = discover()
print(len(found), len({each.uuid for each in found}), why_none)
maps = open("/proc/self/maps").read()
print("libcuda" in maps, "cuda/bindings" in maps)
"""


@needs_stub
def test_devices_are_found_by_a_child(stub_folder: Path) -> None:
    done = run_on_stub(stub_folder, "-c", FIND, devices=2)
    assert done.stdout.splitlines() == ["2 2 ", "True False"], done.stderr


@needs_stub
def test_why_there_is_none_is_told(stub_folder: Path) -> None:
    done = run_on_stub(stub_folder, "-c", FIND, devices=0)
    first, _ = done.stdout.splitlines()
    assert first.startswith("0 0 "), done.stderr
    assert len(first) > len("0 0 ")


def test_the_child_imports_nothing_from_where_the_server_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    found, why_none = discover("libc.so.6")  # as good as a driver for having one
    assert found == ()
    assert "not ours" not in why_none
