# SPDX-License-Identifier: Apache-2.0
"""What the server and its models say about themselves."""

from collections.abc import Iterable, Sequence

from thirdrail_server.inference import grpc_service_pb2 as kserve

# perf_analyzer looks for "statistics" here before it asks for any.
EXTENSIONS = (
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)

Tensor = kserve.ModelInput | kserve.ModelOutput


def server_metadata(
    name: str, version: str, shared_memory: Sequence[str] = ()
) -> kserve.ServerMetadataResponse:
    """shared_memory: the extensions for it that this server offers."""
    extensions = [*EXTENSIONS, *shared_memory]
    return kserve.ServerMetadataResponse(name=name, version=version, extensions=extensions)


def model_metadata(
    config: kserve.ModelConfig, versions: Sequence[int]
) -> kserve.ModelMetadataResponse:
    """A model's signature as callers see it: with the batch dimension, where it has one."""
    batches = config.max_batch_size > 0
    return kserve.ModelMetadataResponse(
        name=config.name,
        versions=[str(version) for version in versions],
        platform=config.platform,
        inputs=_tensors(config.input, batches=batches),
        outputs=_tensors(config.output, batches=batches),
    )


def _tensors(
    declared: Iterable[Tensor], *, batches: bool
) -> list[kserve.ModelMetadataResponse.TensorMetadata]:
    return [
        kserve.ModelMetadataResponse.TensorMetadata(
            name=tensor.name,
            datatype=_datatype(tensor.data_type),
            shape=[-1, *tensor.dims] if batches else tensor.dims,
        )
        for tensor in declared
    ]


def _datatype(data_type: kserve.DataType.ValueType) -> str:
    # The only type whose name in a configuration differs from the one in calls.
    if data_type == kserve.TYPE_STRING:
        return "BYTES"
    return kserve.DataType.Name(data_type).removeprefix("TYPE_")
