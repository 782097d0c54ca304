# SPDX-License-Identifier: Apache-2.0
"""What a worker needs to know to serve a model, read from its completed configuration."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thirdrail.tensors import TensorSpec
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.errors import RepositoryError, blaming
from thirdrail_server.repository.fields import check_fields
from thirdrail_server.repository.labels import labels
from thirdrail_server.repository.queue_policy import queue_policy
from thirdrail_server.repository.specs import input_specs, output_specs
from thirdrail_server.repository.warmup import WarmupRequest, warmup_requests
from thirdrail_server.worker.policy import QueuePolicy

INSTANCES_MAX = 256
ENGINE_THREADS_MAX = 1024
_NUMBER = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """One model's options. All files that the configuration names have been read."""

    name: str
    batch_rows_max: int  # rows a request may have; 0: the model does not batch, no rows axis
    queue: QueuePolicy
    instances: int
    engine_threads: int  # per instance; 0: the worker decides
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: Mapping[str, tuple[str, ...]]  # by output name
    warmup: tuple[WarmupRequest, ...]
    parameters: Mapping[str, str]
    warnings: tuple[str, ...]  # what the configuration says without effect


def model_options(config: ModelConfig, folder: Path, *, queue_requests_max: int) -> ModelOptions:
    """The options of a completed configuration.

    folder: the model's, where labels and warm-up data lie.
    queue_requests_max: the queue's bound where the configuration sets none.
    Raises RepositoryError for fields that are not served, values that are impossible and files
    that cannot be used.
    """
    warnings = check_fields(config)
    with blaming(config.name):
        return ModelOptions(
            name=config.name,
            batch_rows_max=batch_rows_max(config),
            queue=queue_policy(config, queue_requests_max),
            instances=instance_count(config),
            engine_threads=engine_threads(config),
            inputs=input_specs(config),
            outputs=output_specs(config),
            labels=labels(config, folder),
            warmup=warmup_requests(config, folder),
            parameters={key: value.string_value for key, value in config.parameters.items()},
            warnings=warnings,
        )


def batch_rows_max(config: ModelConfig) -> int:
    """Raises RepositoryError when it is negative."""
    if config.max_batch_size < 0:
        raise RepositoryError(f"max_batch_size must be 0 or more, got {config.max_batch_size}")
    return config.max_batch_size


def instance_count(config: ModelConfig) -> int:
    """The instances of all groups together; 1 where none are given. Needed before the engine."""
    counts = [group.count for group in config.instance_group] or [1]
    total = sum(max(count, 1) for count in counts)
    if min(counts) < 0 or total > INSTANCES_MAX:
        raise RepositoryError(
            f"instance_group counts must be 0 or more and {INSTANCES_MAX} at most together, "
            f"got {counts[:10]}"
        )
    return total


def engine_threads(config: ModelConfig) -> int:
    """Threads per instance from parameters.intra_op_thread_count; 0: not given."""
    if "intra_op_thread_count" not in config.parameters:  # indexing a map would add the key
        return 0
    text = config.parameters["intra_op_thread_count"].string_value
    if not (_NUMBER.fullmatch(text) and int(text) <= ENGINE_THREADS_MAX):
        raise RepositoryError(
            "parameters['intra_op_thread_count'] must be a number of threads from 0 (decided by "
            f"the server) to {ENGINE_THREADS_MAX}, got {text[:80]!a}"
        )
    return int(text)
