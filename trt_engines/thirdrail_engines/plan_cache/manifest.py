# SPDX-License-Identifier: Apache-2.0
"""What is known about a plan: JSON beside it, for people and for us."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MANIFEST_FORMAT = 1
MANIFEST_BYTES_MAX = 64 << 20  # a builder that tells of each layer has much to tell


class ManifestError(Exception):
    """These bytes are no manifest that this version reads."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Who builds fills in what it knows; the cache fills in the rest when it saves the plan."""

    source: str = ""  # where the model lay, for people: it is no part of the key
    built_at: str = ""  # UTC, ISO 8601
    build_s: float = 0.0
    peak_rss_bytes: int = 0  # of the build; 0 where nobody looked
    layers: Mapping[str, Any] = field(default_factory=dict)  # a summary, in the builder's words
    tensors: Sequence[Mapping[str, Any]] = ()  # name, direction, type, shape
    precision: Mapping[str, Any] | None = None  # the report of a conversion
    warnings: Sequence[str] = ()
    timing_cache: Mapping[str, int] | None = None  # bytes of it; None where the build used none
    # From here on the cache's.
    format: int = MANIFEST_FORMAT
    key: str = ""
    key_parts: Mapping[str, str] = field(default_factory=dict)
    plan_bytes: int = 0
    plan_sha256: str = ""


def encoded(manifest: Manifest) -> bytes:
    """Raises TypeError or ValueError for what JSON cannot say."""
    fields = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest)}
    text = json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    return f"{text}\n".encode("utf-8", "backslashreplace")


def decoded(data: bytes) -> Manifest:
    """Raises ManifestError for anything that is not a manifest of this format."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise ManifestError("is not JSON") from None
    if not isinstance(fields, dict):
        raise ManifestError("is not a JSON object")
    if fields.get("format") != MANIFEST_FORMAT:
        raise ManifestError(
            f"has format {fields.get('format')!r}, this version reads {MANIFEST_FORMAT}"
        )
    for name, check in _CHECKS.items():
        if name not in fields:
            raise ManifestError(f"has no '{name}'")
        if not check(fields[name]):
            raise ManifestError(f"has a '{name}' of the wrong kind")
    return Manifest(**{name: fields[name] for name in _CHECKS})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"a manifest cannot hold {value!r}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list_of(check: Any) -> Any:
    return lambda value: isinstance(value, list) and all(map(check, value))


_CHECKS: dict[str, Any] = {
    "source": _is_text,
    "built_at": _is_text,
    "build_s": _is_seconds,
    "peak_rss_bytes": _is_count,
    "layers": _is_object,
    "tensors": _is_list_of(_is_object),
    "precision": lambda value: value is None or _is_object(value),
    "warnings": _is_list_of(_is_text),
    "timing_cache": lambda value: (
        value is None or (_is_object(value) and all(map(_is_count, value.values())))
    ),
    "format": _is_count,
    "key": _is_text,
    "key_parts": lambda value: _is_object(value) and all(map(_is_text, value.values())),
    "plan_bytes": _is_count,
    "plan_sha256": _is_text,
}
