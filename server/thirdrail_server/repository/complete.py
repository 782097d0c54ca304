# SPDX-License-Identifier: Apache-2.0
"""A model's configuration, if any, + its engine's tensors -> the configuration in force."""

from collections.abc import Sequence

from thirdrail.tensors import TensorSpec
from thirdrail_engines.engine import EngineSpec
from thirdrail_server.inference.grpc_service_pb2 import (
    ModelConfig,
    ModelInput,
    ModelInstanceGroup,
    ModelOutput,
)
from thirdrail_server.repository.compilation import keep_engine
from thirdrail_server.repository.errors import RepositoryError, blaming
from thirdrail_server.repository.fields import check_fields
from thirdrail_server.repository.layout import MODEL_FILENAME
from thirdrail_server.repository.options import batch_rows_max
from thirdrail_server.repository.specs import (
    Declared,
    check_declared,
    config_type_of,
    dtype_of_config,
)

ON_CPU, ON_GPU = ModelInstanceGroup.KIND_CPU, ModelInstanceGroup.KIND_GPU


def complete(
    name: str,
    config: ModelConfig | None,
    spec: EngineSpec,
    *,
    proven_rows: int = 0,
    filename: str = MODEL_FILENAME,
    is_on_gpu: bool = False,
) -> ModelConfig:
    """The configuration with everything filled in that the engine knows; `config` stays as it is.

    proven_rows: above 0, the batch size for which a proof succeeded; used where
        `may_derive_batching` allows it.
    filename: the model file's.
    is_on_gpu: what KIND_AUTO has come to.
    Raises RepositoryError for fields that are not served, and when the configuration and the model
    file contradict each other.
    """
    whole = ModelConfig()
    if config is not None:
        check_fields(config)  # before a platform that is not served is written over
        whole.CopyFrom(config)
    whole.name = name
    if proven_rows > 0 and may_derive_batching(config, spec):
        whole.max_batch_size = proven_rows
        whole.dynamic_batching.SetInParent()
    with blaming(name):
        _complete_inputs(whole, spec.inputs)
        _complete_outputs(whole, spec.outputs)
    keep_engine(whole)  # before its platform becomes that of the engine at hand
    _complete_rest(whole, spec, filename, ON_GPU if is_on_gpu else ON_CPU)
    return whole


def may_derive_batching(config: ModelConfig | None, spec: EngineSpec) -> bool:
    """Whether batching is left open by the configuration and not excluded by the model's shapes."""
    tensors = (*spec.inputs, *spec.outputs)
    if not spec.inputs or any(not tensor.shape or tensor.shape[0] != -1 for tensor in tensors):
        return False
    return config is None or (
        config.max_batch_size == 0
        and config.WhichOneof("scheduling_choice") is None
        and not config.input  # dims declared without batching include the first axis
        and not config.output
    )


def _complete_inputs(whole: ModelConfig, specs: Sequence[TensorSpec]) -> None:
    check_declared("input", whole.input)
    declared = {tensor.name for tensor in whole.input}
    missing = [s.name for s in specs if not s.optional and s.name not in declared]
    if declared and missing:
        raise RepositoryError(
            f"inputs {sorted(declared)[:20]} are declared, the model file also needs {missing[:20]}"
        )
    if not declared:
        whole.input.extend(ModelInput(name=s.name, optional=s.optional) for s in specs)
    for tensor in whole.input:
        spec = _complete_tensor("input", tensor, specs, batch_rows_max(whole))
        if tensor.optional and not spec.optional:
            raise RepositoryError(
                f"input '{tensor.name}' is declared optional, but the model file needs it"
            )


def _complete_outputs(whole: ModelConfig, specs: Sequence[TensorSpec]) -> None:
    check_declared("output", whole.output)
    if not whole.output:
        whole.output.extend(ModelOutput(name=s.name) for s in specs)
    for tensor in whole.output:  # fewer than the model file has: the others are not served
        _complete_tensor("output", tensor, specs, batch_rows_max(whole))


def _complete_tensor(
    kind: str, tensor: Declared, specs: Sequence[TensorSpec], rows_max: int
) -> TensorSpec:
    """Fills in type and dims where they are not declared. Returns the engine's side of it."""
    spec = next((spec for spec in specs if spec.name == tensor.name), None)
    if spec is None:
        names = [spec.name for spec in specs]
        raise RepositoryError(
            f"{kind} '{tensor.name[:80]}' is declared, but the model file has {names[:20]}"
        )
    if not tensor.data_type:
        tensor.data_type = config_type_of(spec.dtype)
    declared = dtype_of_config(f"{kind} '{tensor.name}'", tensor.data_type)
    if declared is not spec.dtype:
        raise RepositoryError(
            f"{kind} '{tensor.name}' is declared {declared.name}, "
            f"but the model file has {spec.dtype.name}"
        )
    _complete_dims(kind, tensor, spec, rows_max)
    return spec


def _complete_dims(kind: str, tensor: Declared, spec: TensorSpec, rows_max: int) -> None:
    # ONNX leaves out the shapes of some outputs, which then look like those of scalars.
    if kind == "output" and not spec.shape and tensor.dims:
        return
    shape = spec.shape
    if rows_max > 0:
        if not shape or not (shape[0] == -1 or shape[0] == rows_max == 1):
            raise RepositoryError(
                f"max_batch_size is {rows_max}, so {kind} '{tensor.name}' must have -1 (any number "
                f"of rows) as its first dimension, but the model file has {list(shape)}"
            )
        shape = shape[1:]
    if not tensor.dims:
        tensor.dims.extend(shape)
    elif not _is_within(tensor.dims, shape):
        of_rows = " after the dimension for rows" if rows_max > 0 else ""
        raise RepositoryError(
            f"{kind} '{tensor.name}' is declared with dims {list(tensor.dims)}, "
            f"but the model file has {list(shape)}{of_rows}"
        )


def _is_within(dims: Sequence[int], shape: Sequence[int]) -> bool:
    """A declaration may fix what the model file leaves open, not the other way round."""
    return len(dims) == len(shape) and all(s in (-1, d) for d, s in zip(dims, shape, strict=True))


def _complete_rest(
    whole: ModelConfig, spec: EngineSpec, filename: str, kind: ModelInstanceGroup.Kind.ValueType
) -> None:
    whole.platform = spec.platform
    whole.backend = spec.platform.partition("_")[0]
    whole.default_model_filename = whole.default_model_filename or filename
    if whole.version_policy.WhichOneof("policy_choice") is None:
        whole.version_policy.latest.num_versions = 1
    if not whole.instance_group:
        whole.instance_group.add()
    for group in whole.instance_group:
        group.count = group.count or 1
        if group.kind == ModelInstanceGroup.KIND_AUTO:
            group.kind = kind
