# SPDX-License-Identifier: Apache-2.0
"""Tensors as a ModelConfig declares them <-> TensorSpec."""

from collections.abc import Sequence

from thirdrail import dtypes
from thirdrail.dtypes import DType
from thirdrail.tensors import RANK_MAX, TensorSpec
from thirdrail_server.inference.grpc_service_pb2 import (
    DataType,
    ModelConfig,
    ModelInput,
    ModelOutput,
)
from thirdrail_server.repository.errors import RepositoryError

TENSORS_MAX = 4096
NAME_CHARS_MAX = 1024

Declared = ModelInput | ModelOutput


def input_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """The inputs as requests carry them: a model that batches has -1 rows in front of its dims.

    Raises RepositoryError when a declaration lacks its name or type, or is otherwise impossible.
    """
    check_declared("input", config.input)
    return tuple(_spec(tensor, config, tensor.optional) for tensor in config.input)


def output_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """As `input_specs`, for the outputs."""
    check_declared("output", config.output)
    return tuple(_spec(tensor, config, optional=False) for tensor in config.output)


def check_declared(kind: str, tensors: Sequence[Declared]) -> None:
    """Raises RepositoryError for names missing or given twice, and for impossible dims."""
    if len(tensors) > TENSORS_MAX:
        raise RepositoryError(
            f"{len(tensors)} {kind}s are declared, expected at most {TENSORS_MAX}"
        )
    seen: set[str] = set()
    for index, tensor in enumerate(tensors):
        if not 0 < len(tensor.name) <= NAME_CHARS_MAX:
            raise RepositoryError(
                f"{kind}[{index}] needs a name of 1 to {NAME_CHARS_MAX} characters"
            )
        if tensor.name in seen:
            raise RepositoryError(f"{kind} '{tensor.name}' is declared twice")
        seen.add(tensor.name)
        if len(tensor.dims) >= RANK_MAX or any(dim < -1 for dim in tensor.dims):
            raise RepositoryError(
                f"{kind} '{tensor.name}' needs fewer than {RANK_MAX} dims, -1 (any size) or more, "
                f"got {list(tensor.dims[:RANK_MAX])}"
            )


def dtype_of_config(tensor: str, value: DataType.ValueType) -> DType:
    """The row of a ModelConfig's data_type. Raises RepositoryError for one that is not given."""
    name = DataType.Name(value) if value in DataType.values() else f"number {value}"
    row = dtypes.BY_NAME.get("BYTES" if name == "TYPE_STRING" else name.removeprefix("TYPE_"))
    if row is None:
        raise RepositoryError(f"{tensor} needs a data_type, got {name}")
    return row


def config_type_of(dtype: DType) -> DataType.ValueType:
    """How a ModelConfig calls an element type."""
    return DataType.Value("TYPE_STRING" if dtype is dtypes.BYTES else f"TYPE_{dtype.name}")


def _spec(tensor: Declared, config: ModelConfig, optional: bool) -> TensorSpec:
    rows = (-1,) if config.max_batch_size > 0 else ()
    dtype = dtype_of_config(f"tensor '{tensor.name}'", tensor.data_type)
    return TensorSpec(tensor.name, dtype, (*rows, *tensor.dims), optional)
