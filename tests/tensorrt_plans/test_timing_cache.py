# SPDX-License-Identifier: Apache-2.0
"""The calls about timings, on the package that offers them and times nothing.

TensorRT itself, which does, is not here: what is shown is that the calls are made as both have
them, that what was left is given back, and that nonsense costs no build.
"""

from pathlib import Path

import pytest

from tensorrt_plans.conftest import Build
from tensorrt_plans.test_builds import rows
from thirdrail_engines.build_timings import FILE_NAME
from thirdrail_engines.tensorrt.api import Api

pytestmark = [
    pytest.mark.needs_tensorrt,
    # "Timing cache operations are no-ops in TensorRT-RTX": that it is so is what `Api` knows.
    pytest.mark.filterwarnings("ignore:.*Timing cache operations:DeprecationWarning"),
]


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Api, "has_timing_cache", property(lambda self: True))
    return tmp_path / "build" / FILE_NAME


def test_a_build_leaves_its_timings_and_the_next_begins_with_them(
    build: Build, sum_path: Path, left: Path
) -> None:
    assert build(sum_path, profiles=[rows(1, 2, 4)]).plan.exists()
    first = left.read_bytes()
    assert first
    assert build(sum_path, profiles=[rows(1, 2, 8)]).plan.exists()
    assert left.read_bytes()


def test_damaged_timings_cost_no_build(build: Build, sum_path: Path, left: Path) -> None:
    left.parent.mkdir()
    left.write_bytes(b"nonsense" * 100)
    assert build(sum_path, profiles=[rows(1, 2, 4)]).plan.exists()
    assert left.read_bytes() != b"nonsense" * 100


def test_a_build_that_is_to_use_none_leaves_none(build: Build, sum_path: Path, left: Path) -> None:
    assert build(sum_path, profiles=[rows(1, 2, 4)], uses_timing_cache=False).plan.exists()
    assert not left.exists()
