# SPDX-License-Identifier: Apache-2.0
"""Manifests: what was written is read, and nothing else is taken for one."""

import contextlib
import dataclasses
import json
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thirdrail_engines.plan_cache.manifest import (
    Manifest,
    ManifestError,
    decoded,
    encoded,
)

FULL = Manifest(
    source="/models/é/1/model.onnx",
    built_at="2026-11-21T06:00:00Z",
    build_s=1.25,
    peak_rss_bytes=1 << 20,
    layers={"convolutions": 3, "names": ["a", "b"]},
    tensors=[{"name": "x", "direction": "input", "type": "FP32", "shape": [-1, 3]}],
    precision={"converted": 7},
    warnings=["slow"],
    timing_cache={"given_bytes": 0, "kept_bytes": 8},
    key="0" * 64,
    key_parts={"builder": "onnxruntime"},
    plan_bytes=7,
    plan_sha256="1" * 64,
)


def test_what_was_written_is_read() -> None:
    assert decoded(encoded(FULL)) == FULL
    assert decoded(encoded(Manifest())) == dataclasses.replace(Manifest(), tensors=[], warnings=[])


def test_people_can_read_it() -> None:
    lines = encoded(FULL).decode().splitlines()
    assert '  "source": "/models/é/1/model.onnx",' in lines
    assert '  "build_s": 1.25,' in lines


def test_any_mapping_and_sequence_will_do() -> None:
    manifest = dataclasses.replace(
        FULL, layers=MappingProxyType({"a": (1, 2)}), tensors=(MappingProxyType({"name": "x"}),)
    )
    read = decoded(encoded(manifest))
    assert read.layers == {"a": [1, 2]}
    assert read.tensors == [{"name": "x"}]


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(TypeError, match="a manifest cannot hold"):
        encoded(dataclasses.replace(FULL, layers={"a": object()}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        encoded(dataclasses.replace(FULL, build_s=float("nan")))


def test_a_name_in_no_encoding_can_be_written() -> None:
    assert decoded(encoded(dataclasses.replace(FULL, source="a\udcff"))).key == FULL.key


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Manifest)])
def test_each_field_is_needed_and_of_its_kind(field: str) -> None:
    fields: dict[str, Any] = json.loads(encoded(FULL))
    for wrong in (True, -1, float("inf"), [{}, 1]):
        fields[field] = wrong
        with pytest.raises(ManifestError, match=field):
            decoded(json.dumps(fields).encode())
    del fields[field]
    with pytest.raises(ManifestError, match=field):
        decoded(json.dumps(fields).encode())


def test_a_later_versions_manifest_is_said_to_be_one() -> None:
    data = encoded(dataclasses.replace(FULL, format=2))
    with pytest.raises(ManifestError, match="has format 2, this version reads 1"):
        decoded(data)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}"])
def test_other_files_are_none(data: bytes) -> None:
    with pytest.raises(ManifestError):
        decoded(data)


@given(st.data())
def test_damaged_ones_are_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(encoded(FULL))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ManifestError):
        decoded(bytes(whole))
