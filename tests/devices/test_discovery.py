# SPDX-License-Identifier: Apache-2.0
"""Finding devices through the real bindings, on a driver that was made for the purpose."""

from pathlib import Path

import pytest

from cuda.test_driver import run_on_stub, stub_folder

__all__ = ["stub_folder"]

pytestmark = [pytest.mark.needs_gcc, pytest.mark.needs_cuda_bindings]

FIND = """
from thirdrail_engines.cuda.discovery import discover

found, why_none = discover()
print(len(found), len({each.uuid for each in found}), why_none)
maps = open("/proc/self/maps").read()
print("libcuda" in maps, "cuda/bindings" in maps)
"""


def test_devices_are_found_by_a_child(stub_folder: Path) -> None:
    done = run_on_stub(stub_folder, "-c", FIND, devices=2)
    assert done.stdout.splitlines() == ["2 2 ", "True False"], done.stderr


def test_why_there_is_none_is_told(stub_folder: Path) -> None:
    done = run_on_stub(stub_folder, "-c", FIND, devices=0)
    first, _ = done.stdout.splitlines()
    assert first.startswith("0 0 "), done.stderr
    assert len(first) > len("0 0 ")
