# SPDX-License-Identifier: Apache-2.0
"""A model's inputs as the manifest of one of its plans has them.

What a plan is asked for by depends on the model's inputs, which take a whole load of the model to
learn. Where a plan was made of it before, that is written down already.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thirdrail import dtypes
from thirdrail.tensors import RANK_MAX, TensorSpec
from thirdrail_engines.plan_cache import Manifest, PlanCache, digest_of
from thirdrail_engines.plans import Builder


def inputs_on_record(
    path: Path, builder: Builder, cache: PlanCache | None
) -> tuple[TensorSpec, ...] | None:
    """Those that a plan needs, hence no optional ones; None where nothing is known of them.

    A hint: what is made of it counts only where there is a plan with that very key.
    Raises ModelFileError when the file cannot be read.
    """
    if cache is None:
        return None
    wanted = {"source": digest_of(path), "source_format": path.suffix, "builder": builder.value}
    for manifest in cache.manifests():
        if all(manifest.key_parts.get(name) == value for name, value in wanted.items()):
            return _inputs(manifest)
    return None


def _inputs(manifest: Manifest) -> tuple[TensorSpec, ...] | None:
    """None for what no builder of ours would have written."""
    try:
        return tuple(
            _input(fields) for fields in manifest.tensors if fields["direction"] == "input"
        )
    except (KeyError, TypeError, ValueError):
        return None


def _input(fields: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(fields["shape"])
    if len(shape) > RANK_MAX or not all(type(dim) is int and dim >= -1 for dim in shape):
        raise ValueError
    return TensorSpec(str(fields["name"]), dtypes.BY_NAME[fields["type"]], shape)
