# SPDX-License-Identifier: Apache-2.0
"""`model_warmup` -> requests to run before a model counts as ready."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thirdrail.dtypes import BYTES, DType
from thirdrail.tensors import Array, TensorSpec, array_of_bytes, element_count
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig, ModelWarmup
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.paths import read_bounded, resolve_inside
from thirdrail_server.repository.specs import dtype_of_config, input_specs

FOLDER = "warmup"
REQUESTS_MAX = 100
RUNS_MAX = 10_000
BYTES_MAX = 256 << 20  # all requests of a model together

_OBJECT_BYTES = 64  # what one BYTES element costs as a Python object, about
_SEED = 0


@dataclass(frozen=True, slots=True)
class WarmupRequest:
    """Inputs as an engine takes them (C-contiguous; BYTES as objects), to be run `runs` times."""

    name: str
    runs: int
    inputs: Mapping[str, Array]


def warmup_requests(config: ModelConfig, folder: Path) -> tuple[WarmupRequest, ...]:
    """The warm-up requests; data files are read from the folder `warmup` in the model's `folder`.

    Raises RepositoryError when a request does not fit the model, a file is missing or of the wrong
    size, or all of it is too large.
    """
    if len(config.model_warmup) > REQUESTS_MAX:
        raise RepositoryError(
            f"model_warmup has {len(config.model_warmup)} requests, expected at most {REQUESTS_MAX}"
        )
    reader = _Reader(folder, BYTES_MAX)
    specs = input_specs(config)
    return tuple(_request(each, config, specs, reader) for each in config.model_warmup)


def _request(
    warmup: ModelWarmup, config: ModelConfig, specs: Sequence[TensorSpec], reader: "_Reader"
) -> WarmupRequest:
    what = f"model_warmup '{warmup.name}'"
    rows_max = config.max_batch_size or 1
    if warmup.batch_size > rows_max:
        raise RepositoryError(
            f"{what}: batch_size must be at most {rows_max}, got {warmup.batch_size}"
        )
    if warmup.count > RUNS_MAX:
        raise RepositoryError(f"{what}: count must be at most {RUNS_MAX}, got {warmup.count}")
    rows = (max(warmup.batch_size, 1),) if config.max_batch_size > 0 else ()
    inputs = {
        name: reader.array(f"{what}: input '{name}'", each, rows)
        for name, each in sorted(warmup.inputs.items())
    }
    if specs:
        _check_fit(what, inputs, specs, warmup)
    return WarmupRequest(warmup.name, max(warmup.count, 1), inputs)


def _check_fit(
    what: str, inputs: Mapping[str, Array], specs: Sequence[TensorSpec], warmup: ModelWarmup
) -> None:
    by_name = {spec.name: spec for spec in specs}
    unknown = sorted(inputs.keys() - by_name.keys())
    absent = sorted(s.name for s in specs if not s.optional and s.name not in inputs)
    if unknown or absent:
        raise RepositoryError(f"{what}: unknown inputs {unknown}, missing inputs {absent}")
    for name, array in inputs.items():
        spec = by_name[name]
        dtype = dtype_of_config(f"{what}: input '{name}'", warmup.inputs[name].data_type)
        if dtype is not spec.dtype or not _fits(array.shape, spec.shape):
            raise RepositoryError(
                f"{what}: input '{name}' must be {spec.dtype.name} {list(spec.shape)}, "
                f"got {dtype.name} {list(array.shape)}"
            )


def _fits(shape: Sequence[int], expected: Sequence[int]) -> bool:
    return len(shape) == len(expected) and all(
        e in (-1, d) for d, e in zip(shape, expected, strict=True)
    )


@dataclass(slots=True)
class _Reader:
    folder: Path
    bytes_left: int

    def array(self, what: str, source: ModelWarmup.Input, rows: tuple[int, ...]) -> Array:
        """One input, C-contiguous; a file holds one row, which is repeated."""
        dtype = dtype_of_config(what, source.data_type)
        shape = (*rows, *source.dims)
        count = element_count(what, shape)
        self._take(what, count * (dtype.itemsize or _OBJECT_BYTES))
        match source.WhichOneof("input_data_type"):
            case "zero_data":
                return _zeros(what, dtype, shape)
            case "random_data":
                return _random(what, dtype, shape)
            case "input_data_file":
                row = self._file(what, dtype, source)
                return np.array(np.broadcast_to(row, shape), order="C")
        raise RepositoryError(f"{what} needs zero_data, random_data or input_data_file")

    def _file(self, what: str, dtype: DType, source: ModelWarmup.Input) -> Array:
        boundary = self.folder.resolve()
        path = resolve_inside(boundary, self.folder / FOLDER, source.input_data_file, what)
        data = read_bounded(path, BYTES_MAX, f"{what}: its file")
        self._take(what, len(data) if dtype is BYTES else 0)
        return array_of_bytes(what, dtype, source.dims, data)

    def _take(self, what: str, size: int) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise RepositoryError(f"{what}: the warm-up takes more than {BYTES_MAX} bytes")


def _zeros(what: str, dtype: DType, shape: Sequence[int]) -> Array:
    if dtype is BYTES:
        return np.full(shape, b"", dtype=np.object_)
    if dtype.numpy is None:
        raise RepositoryError(f"{what} is BF16: install ml_dtypes to warm up with it")
    return np.zeros(shape, dtype=dtype.numpy)


def _random(what: str, dtype: DType, shape: Sequence[int]) -> Array:
    """From 0 to 1: random integers of full width would be no valid index, length or class."""
    array = _zeros(what, dtype, shape)
    if dtype is BYTES:
        return array
    random = np.random.default_rng(_SEED)
    if array.dtype.kind in "biu":
        array[...] = random.integers(0, 2, size=shape)
    else:
        array[...] = random.random(size=shape)
    return array
