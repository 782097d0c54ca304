# SPDX-License-Identifier: Apache-2.0
"""The key: everything that changes a plan changes it, and nothing else does."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from thirdrail_engines import ModelFileError
from thirdrail_engines.plan_cache import key_of
from thirdrail_engines.plans import Builder, PlanRequest, Precision, Profile, ShapeRange

PROFILE = Profile({"x": ShapeRange((1, 3), (4, 3), (8, 3))})


def write_model(folder: Path, weight: float = 1.0, *, name: str = "model.onnx") -> Path:
    """y = x + w, with the weights in a file beside it."""
    folder.mkdir(exist_ok=True)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "add",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.full(3, weight, np.float32), "w")],
    )
    onnx.save(
        helper.make_model(graph),
        folder / name,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return folder / name


@pytest.fixture
def request_(tmp_path: Path) -> PlanRequest:
    (tmp_path / "plugin.so").write_bytes(b"plugin")
    return PlanRequest(
        source=write_model(tmp_path / "model"),
        builder=Builder.TENSORRT_RTX,
        builder_version="1.7.1",
        profiles=(PROFILE,),
        compute_capabilities=("sm86", "sm89"),
        plugins=(tmp_path / "plugin.so",),
    )


def appended(path: Path, data: bytes = b"more") -> Path:
    path.write_bytes(path.read_bytes() + data)
    return path


# For each field of PlanRequest that is part of the key: ways to change it.
CHANGES: dict[str, list[Callable[[PlanRequest], Any]]] = {
    "source": [
        lambda r: write_model(r.source.parent.parent / "other", 2.0),
        lambda r: appended(r.source.parent / "weights.bin").parent / "model.onnx",
        lambda r: Path(str(r.source)).rename(r.source.with_suffix(".pt2")),
    ],
    "builder": [lambda r: Builder.TENSORRT],
    "builder_version": [lambda r: "1.7.2", lambda r: "1.71"],
    "precision": [lambda r: Precision.FP16],
    "converter": [lambda r: "rules 1, onnxruntime 1.31.1"],
    "rules": [lambda r: "positions 1"],
    "profiles": [
        lambda r: (),
        lambda r: (PROFILE, PROFILE),
        lambda r: (Profile({"y": PROFILE.inputs["x"]}),),
        lambda r: (Profile({"x": ShapeRange((2, 3), (4, 3), (8, 3))}),),
        lambda r: (Profile({"x": ShapeRange((1, 3), (5, 3), (8, 3))}),),
        lambda r: (Profile({"x": ShapeRange((1, 3), (4, 3), (9, 3))}),),
        lambda r: (Profile({"x": ShapeRange((1, 3, 1), (4, 3, 1), (8, 3, 1))}),),
    ],
    "compute_capabilities": [
        lambda r: ("sm86",),
        lambda r: (),
        lambda r: ("sm86", "sm89", "sm120"),
    ],
    "target": [lambda r: "avx512"],
    "workspace_bytes": [lambda r: 0, lambda r: 1 << 30],
    "optimization_level": [lambda r: 0, lambda r: 5],
    "is_version_compatible": [lambda r: True],
    "is_refittable": [lambda r: True],
    "plugins": [
        lambda r: (),
        lambda r: (appended(r.plugins[0]),),
        lambda r: (*r.plugins, *r.plugins),
    ],
}
NOT_IN_THE_KEY: dict[str, Any] = {"uses_timing_cache": False, "threads_max": 7}


def test_the_lists_above_are_complete() -> None:
    assert {*CHANGES, *NOT_IN_THE_KEY} == {f.name for f in dataclasses.fields(PlanRequest)}


@pytest.mark.parametrize(
    ("field", "change"),
    [(field, change) for field, changes in CHANGES.items() for change in changes],
)
def test_each_part_changes_the_key(
    request_: PlanRequest, field: str, change: Callable[[PlanRequest], Any]
) -> None:
    before = key_of(request_)
    changed = replace(request_, **{field: change(request_)})
    after = key_of(changed)
    assert after.digest != before.digest
    assert after.parts != before.parts, "people cannot see what changed"
    assert key_of(changed) == after


@pytest.mark.parametrize("field", NOT_IN_THE_KEY)
def test_how_it_is_built_is_no_part_of_it(request_: PlanRequest, field: str) -> None:
    changed = replace(request_, **{field: NOT_IN_THE_KEY[field]})
    assert key_of(changed) == key_of(request_)


def test_the_format_is_part_of_it(tmp_path: Path) -> None:
    """The same bytes are converted in another way."""
    for name in ("model.pt", "model.pt2"):
        (tmp_path / name).write_bytes(b"same")
    one, other = (
        key_of(PlanRequest(tmp_path / name, Builder.TENSORRT, "11.4"))
        for name in ("model.pt", "model.pt2")
    )
    assert one.digest != other.digest


def test_where_files_lie_is_no_part_of_it(request_: PlanRequest, tmp_path: Path) -> None:
    before = key_of(request_)
    os.rename(tmp_path / "model", tmp_path / "moved")
    os.rename(tmp_path / "moved/model.onnx", tmp_path / "moved/renamed.onnx")
    os.rename(tmp_path / "plugin.so", tmp_path / "lib.so")
    moved = replace(
        request_, source=tmp_path / "moved/renamed.onnx", plugins=(tmp_path / "lib.so",)
    )
    assert key_of(moved) == before


def test_the_order_of_inputs_and_capabilities_is_no_part_of_it(request_: PlanRequest) -> None:
    wide, narrow = ShapeRange((1,), (2,), (3,)), ShapeRange((1,), (1,), (1,))
    one = replace(request_, profiles=(Profile({"a": wide, "b": narrow}),))
    other = replace(
        request_,
        profiles=(Profile({"b": narrow, "a": wide}),),
        compute_capabilities=("sm89", "sm86", "sm89"),
    )
    assert key_of(one) == key_of(other)


def test_the_order_of_profiles_is_part_of_it(request_: PlanRequest) -> None:
    small, large = (Profile({"x": ShapeRange((n,), (n,), (n,))}) for n in (1, 2))
    one = replace(request_, profiles=(small, large))
    assert key_of(one) != key_of(replace(request_, profiles=(large, small)))


def test_its_parts_are_readable(request_: PlanRequest) -> None:
    parts = key_of(request_).parts
    assert parts["builder"] == "tensorrt_rtx"
    assert parts["compute_capabilities"] == '["sm86","sm89"]'
    assert parts["source"].startswith("sha256:")
    assert '"weights.bin":"sha256:' in parts["weights"]
    assert all(isinstance(value, str) for value in parts.values())


@pytest.mark.parametrize("missing", ["model/model.onnx", "model/weights.bin", "plugin.so"])
def test_what_cannot_be_read_is_named(request_: PlanRequest, tmp_path: Path, missing: str) -> None:
    (tmp_path / missing).unlink()
    with pytest.raises(ModelFileError, match=f"cannot read .*{missing}: no such file"):
        key_of(request_)


# No two requests share a key, whatever is in their texts.

nasty = st.text(alphabet=st.sampled_from('"\\[]{},:x\n\0é\ud800'), max_size=4)
shapes = st.lists(st.integers(0, 12), max_size=3).map(tuple)
ranges = st.builds(ShapeRange, shapes, shapes, shapes)
profiles = st.builds(Profile, st.dictionaries(nasty, ranges, max_size=2))
flags = st.booleans()
requests = st.builds(
    PlanRequest,
    source=st.just(Path()),
    builder=st.sampled_from(Builder),
    builder_version=nasty,
    precision=st.sampled_from(Precision),
    profiles=st.lists(profiles, max_size=2).map(tuple),
    compute_capabilities=st.sets(nasty, max_size=2).map(lambda each: tuple(sorted(each))),
    target=nasty,
    workspace_bytes=st.none() | st.integers(0, 2),
    optimization_level=st.none() | st.integers(0, 2),
    is_version_compatible=flags,
    is_refittable=flags,
)


@given(one=requests, other=requests)
def test_two_requests_share_a_key_only_if_they_are_equal(
    tmp_path_factory: pytest.TempPathFactory, one: PlanRequest, other: PlanRequest
) -> None:
    source = tmp_path_factory.getbasetemp() / "same.pt2"
    source.write_bytes(b"same")
    one, other = replace(one, source=source), replace(other, source=source)
    assert (key_of(one) == key_of(other)) == (one == other)


@given(requests, st.data())
def test_one_changed_text_changes_the_key(
    tmp_path_factory: pytest.TempPathFactory, one: PlanRequest, data: st.DataObject
) -> None:
    """The same with requests that are nearly equal."""
    source = tmp_path_factory.getbasetemp() / "same.pt2"
    source.write_bytes(b"same")
    one = replace(one, source=source)
    field = data.draw(st.sampled_from(["builder_version", "target", "profiles"]))
    drawn: Any = data.draw(
        nasty if field != "profiles" else st.lists(profiles, max_size=2).map(tuple)
    )
    other = replace(one, **{field: drawn})
    assert (key_of(one) == key_of(other)) == (one == other)
    assert (key_of(one).digest == key_of(other).digest) == (one == other)


@given(requests, st.randoms())
def test_the_order_of_a_mapping_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, one: PlanRequest, random: Any
) -> None:
    source = tmp_path_factory.getbasetemp() / "same.pt2"
    source.write_bytes(b"same")

    def shuffled(profile: Profile) -> Profile:
        items = list(profile.inputs.items())
        random.shuffle(items)
        return Profile(dict(items))

    capabilities = list(one.compute_capabilities)
    random.shuffle(capabilities)
    one = replace(one, source=source)
    other = replace(
        one,
        profiles=tuple(map(shuffled, one.profiles)),
        compute_capabilities=tuple(capabilities),
    )
    assert key_of(one) == key_of(other)
