# SPDX-License-Identifier: Apache-2.0
"""What a plan is called: a digest of everything that changes it.

The parts are taken from PlanRequest field by field, and files by their content, so that a new field
is part of the key from its first day. Where a file lies and what it is called are not.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thirdrail_engines.plan_cache.digests import Digest, digest_of
from thirdrail_engines.plan_cache.external_weights import weights_beside
from thirdrail_engines.plans import PlanRequest

KEY_FORMAT = 1  # another one makes every older plan a miss


@dataclass(frozen=True, slots=True)
class PlanKey:
    """digest: SHA-256 in lower-case hex. parts: what went into it, for people."""

    digest: str
    parts: Mapping[str, str]


def key_of(request: PlanRequest, digest: Digest = digest_of) -> PlanKey:
    """Reads the source, the weights that an .onnx file keeps beside itself, and the plugins.

    digest: of a file, for those who have KnownDigests.
    Raises ModelFileError for what cannot be read.
    """
    values: dict[str, Any] = {"key_format": KEY_FORMAT}
    for each in dataclasses.fields(request):
        if each.compare:
            values[each.name] = _plain(getattr(request, each.name), digest)
    values["source_format"] = request.source.suffix
    values["weights"] = {
        location: digest(request.source.parent / location)
        for location in weights_beside(request.source)
    }
    # A builder is told one capability after the other, and makes the same plan in any order.
    values["compute_capabilities"] = sorted(set(request.compute_capabilities))
    parts = {name: v if isinstance(v, str) else _json(v) for name, v in sorted(values.items())}
    return PlanKey(hashlib.sha256(_json(values).encode()).hexdigest(), parts)


def _plain(value: Any, digest: Digest) -> Any:
    """What JSON tells apart wherever two requests differ; mappings in one order, files as bytes."""
    if isinstance(value, Path):
        return digest(value)
    if isinstance(value, tuple):
        return [_plain(each, digest) for each in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(each, digest) for name, each in value.items()}
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), digest) for f in dataclasses.fields(value)}
    if isinstance(value, str):  # also the members of a StrEnum
        return str(value)
    assert value is None or isinstance(value, int), f"no plain form of {value!r}"
    return value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
