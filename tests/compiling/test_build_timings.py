# SPDX-License-Identifier: Apache-2.0
"""Which builds get the timings of earlier ones, and what is taken of theirs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from thirdrail_engines.build_timings import FILE_NAME, BuildTimings, timings_name
from thirdrail_engines.plan_cache import PlanCache
from thirdrail_engines.plans import Builder, PlanRequest

REQUEST = PlanRequest(
    Path("model.onnx"), Builder.TENSORRT, "11.4.0", target="NVIDIA L4 sm89 CUDA 13.0"
)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[PlanCache]:
    with PlanCache(tmp_path / "cache", 1 << 20) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "build"
    made.mkdir()
    return made


def test_a_build_begins_with_what_the_last_one_left(cache: PlanCache, folder: Path) -> None:
    first = BuildTimings(cache, REQUEST, folder)
    first.lay_out()
    assert (folder / FILE_NAME).read_bytes() == b""
    (folder / FILE_NAME).write_bytes(b"measured")
    first.take_back()
    assert first.figures == {"given_bytes": 0, "kept_bytes": 8}
    (folder / FILE_NAME).unlink()
    second = BuildTimings(cache, replace(REQUEST, source=Path("another.onnx")), folder)
    second.lay_out()
    assert (folder / FILE_NAME).read_bytes() == b"measured"
    second.take_back()
    assert second.figures == {"given_bytes": 8, "kept_bytes": 8}


@pytest.mark.parametrize(
    "request_",
    [replace(REQUEST, uses_timing_cache=False), replace(REQUEST, builder=Builder.TENSORRT_RTX)],
    ids=["turned off", "times nothing"],
)
def test_some_builds_use_none(cache: PlanCache, folder: Path, request_: PlanRequest) -> None:
    timings = BuildTimings(cache, request_, folder)
    timings.lay_out()
    timings.take_back()
    assert timings.figures is None
    assert list(folder.iterdir()) == []


def test_timings_are_those_of_one_package_version_and_gpu() -> None:
    others = (
        REQUEST,
        replace(REQUEST, builder_version="11.5.0"),
        replace(REQUEST, target="NVIDIA L40 sm89 CUDA 13.0"),
        replace(REQUEST, compute_capabilities=("current",)),
    )
    assert len({timings_name(each) for each in others}) == len(others)


def test_a_link_in_their_place_is_not_followed(
    cache: PlanCache, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    timings = BuildTimings(cache, REQUEST, folder)
    timings.lay_out()
    (folder / FILE_NAME).unlink()
    (folder / FILE_NAME).symlink_to(tmp_path / "secret")
    timings.take_back()
    assert timings.figures == {"given_bytes": 0, "kept_bytes": 0}
    assert "the build left no timings" in caplog.text


def test_a_folder_that_is_full_costs_a_warning(
    cache: PlanCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / FILE_NAME).mkdir()
    BuildTimings(cache, REQUEST, folder).lay_out()
    assert "the build begins without timings" in caplog.text
