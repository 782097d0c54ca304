# SPDX-License-Identifier: Apache-2.0
"""The proof that a model may be batched: seeded rows, run singly and together, must agree.

That the first dimension is the batch is a convention, not a fact: a model may keep it elsewhere,
mix its rows, or fix them. Agreement on random rows is evidence strong enough to batch what nobody
configured.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thirdrail import dtypes
from thirdrail.dtypes import BOOL, BYTES
from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.engine import Engine, EngineError

TRIAL_BYTES_MAX = 64 << 20

# Sizes for dimensions that the file leaves open, and bounds for whole numbers: most models accept
# one of them. Image models want multiples of 32; small numbers are valid as indices, lengths and
# flags alike.
_TRIALS = tuple((size, whole_max) for whole_max in (100, 1) for size in (32, 64, 8, 1))

# How far results may differ, as a part of the largest: other sums in another order, never another
# row.
_TOLERANCE = {"FP64": 1e-9, "FP32": 1e-3, "FP16": 2e-2, "BF16": 1e-1}
FLOATS = frozenset(dtypes.BY_NAME[name] for name in _TOLERANCE)


@dataclass(frozen=True, slots=True)
class BatchProof:
    """agreed: rows may be batched. Otherwise `reason` says why not, in words for the log."""

    agreed: bool
    reason: str = ""


def prove_batching(engine: Engine, rows: int) -> BatchProof:
    """Run `rows` seeded rows, one by one and as one batch. Needs at least two rows to compare."""
    assert rows >= 2
    spec = engine.spec
    inputs = [tensor for tensor in spec.inputs if not tensor.optional]
    for tensor in (*inputs, *spec.outputs):
        if tensor.name in spec.unranked:
            return BatchProof(False, f"the rank of '{tensor.name}' is not known")
        if tensor.shape[:1] != (-1,):
            return BatchProof(
                False,
                f"'{tensor.name}' has the shape {list(tensor.shape)}: no open first dimension",
            )
    if not inputs:
        return BatchProof(False, "the model has no inputs")
    refusal = ""
    for size, whole_max in _TRIALS:
        batch = seeded_inputs(inputs, rows, size=size, whole_max=whole_max)
        if batch is None:
            refusal = refusal or f"a trial would take more than {TRIAL_BYTES_MAX} bytes"
            continue
        try:
            singles = [_run(engine, _row(batch, row)) for row in range(rows)]
        except EngineError as error:
            refusal = refusal or f"no trial input was accepted: {error}"
            continue
        return _compare(engine, batch, singles)
    return BatchProof(False, refusal)


def seeded_inputs(
    inputs: Iterable[TensorSpec],
    rows: int | None,
    *,
    size: int = 32,
    whole_max: int = 1,
    seed: int = 0,
) -> dict[str, Array] | None:
    """Random inputs, the same for the same seed; also for warm-up.

    rows: takes the place of an open first dimension (None: it has the trial size like all others).
    size: of every other open dimension. Floats are normally distributed, whole numbers lie between
    0 and whole_max, BYTES are such numbers in decimal.
    Returns None when the inputs together would take more than TRIAL_BYTES_MAX.
    """
    random = np.random.default_rng(seed)
    shapes = {tensor: _trial_shape(tensor.shape, rows, size) for tensor in inputs}
    total = sum(math.prod(shape) * (t.dtype.itemsize or 64) for t, shape in shapes.items())
    if total > TRIAL_BYTES_MAX:
        return None
    return {
        tensor.name: random_array(random, tensor, shape, whole_max)
        for tensor, shape in shapes.items()
    }


def _trial_shape(shape: Sequence[int], rows: int | None, size: int) -> tuple[int, ...]:
    trial = [size if dim == -1 else dim for dim in shape]
    if rows is not None and shape and shape[0] == -1:
        trial[0] = rows
    return tuple(trial)


def random_array(
    random: "np.random.Generator", tensor: TensorSpec, shape: tuple[int, ...], whole_max: int
) -> Array:
    """One input, of values as `seeded_inputs` has them."""
    if tensor.dtype in FLOATS:
        assert tensor.dtype.numpy is not None
        wide = np.float64 if tensor.dtype.name == "FP64" else np.float32
        return random.standard_normal(shape, dtype=wide).astype(tensor.dtype.numpy, copy=False)
    if tensor.dtype is BOOL:
        return random.integers(0, 2, shape).astype(np.bool_)
    whole = random.integers(0, whole_max + 1, shape)
    if tensor.dtype is BYTES:
        return dtypes.object_array([b"%d" % number for number in whole.flat], shape)
    assert tensor.dtype.numpy is not None
    return whole.astype(tensor.dtype.numpy)


def _row(batch: Mapping[str, Array], row: int) -> dict[str, Array]:
    return {name: array[row : row + 1] for name, array in batch.items()}


def _run(engine: Engine, inputs: Mapping[str, Array]) -> dict[str, Array]:
    return engine.run(inputs, [tensor.name for tensor in engine.spec.outputs], {})


def _compare(
    engine: Engine, batch: Mapping[str, Array], singles: Sequence[Mapping[str, Array]]
) -> BatchProof:
    rows = len(singles)
    outputs = engine.spec.outputs
    if all(_is_same(outputs, singles[0], single) for single in singles[1:]):
        return BatchProof(False, "the trial rows prove nothing: all have the same result")
    try:
        together = _run(engine, batch)
    except EngineError as error:
        return BatchProof(False, f"a batch of {rows} rows fails: {error}")
    for tensor in outputs:
        name = tensor.name
        for row, single in enumerate(singles):
            fault = _difference(tensor, together[name], row, rows, single[name])
            if fault:
                return BatchProof(False, f"output '{name}' {fault}")
    return BatchProof(True)


def _is_same(
    outputs: Iterable[TensorSpec], left: Mapping[str, Array], right: Mapping[str, Array]
) -> bool:
    """Whether two results are one to the comparison: then it would not see the one in the other's
    place."""
    return all(_agrees(tensor, left[tensor.name], right[tensor.name]) for tensor in outputs)


def _difference(tensor: TensorSpec, together: Array, row: int, rows: int, single: Array) -> str:
    """What is wrong with one row of one output, or nothing."""
    if single.shape[:1] != (1,) or together.shape != (rows, *single.shape[1:]):
        return (
            f"has the shape {list(together.shape)} for {rows} rows and {list(single.shape)} for one"
        )
    agrees = _agrees(tensor, together[row], single[0])
    return "" if agrees else f"differs in row {row} between a batch and a single run"


def _agrees(tensor: TensorSpec, found: Array, expected: Array) -> bool:
    if found.shape != expected.shape:
        return False
    tolerance = _TOLERANCE.get(tensor.dtype.name)
    if tolerance is None:
        return bool((found == expected).all())
    wide, exact = found.astype(np.float64), expected.astype(np.float64)
    scale = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0))
    return np.allclose(wide, exact, rtol=0.0, atol=tolerance * scale, equal_nan=True)
