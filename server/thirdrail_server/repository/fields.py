# SPDX-License-Identifier: Apache-2.0
"""The field table: what each field of a ModelConfig does here.

Honoured: it has its effect. Harmless: it has none, results stay right, and a warning says so.
Refused: without it the model would answer wrongly or not at all, so the load fails. Every field of
ModelConfig, at any depth, has a row or lies below one; a test walks the descriptor to prove it.

A row's path names fields from ModelConfig down, through repeated fields and map values. A Harmless
or Refused row speaks for all that lies below it. A message without a row of its own only groups
those that have one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from google.protobuf.message import Message

from thirdrail_engines.compile_options import is_compile_key
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.compilation import (
    ENGINES_BY_PLATFORM,
    accelerator_refusal,
    accelerator_warning,
)
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.layout import NOT_SERVED

FINDINGS_MAX = 20  # told per model; a configuration of a megabyte could earn as much again

ENGINE_PARAMETERS = ("intra_op_thread_count",)
_PLATFORM_TEXTS = {
    "ensemble": f"ensembles are {NOT_SERVED}",
    "python": f"models written in Python are {NOT_SERVED}",
    "tensorflow": f"TensorFlow models are {NOT_SERVED}",
}


class Fate(Enum):
    HONOURED = "honoured"
    HARMLESS = "harmless"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Finding:
    """A field that is set and not (wholly) honoured."""

    fate: Fate
    text: str


# A judge sees a field's value (all of it, if repeated or a map) and the message that holds it.
Judge = Callable[[Any, Any], Finding | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """One row. `judge` runs only where the field differs from its proto3 default."""

    fate: Fate
    text: str
    judge: Judge


def honoured(unless: Judge = lambda value, holder: None) -> Rule:
    """Has its effect, except for the values that `unless` finds something about."""
    return Rule(Fate.HONOURED, "", unless)


def harmless(why: str) -> Rule:
    finding = Finding(Fate.HARMLESS, why)
    return Rule(Fate.HARMLESS, why, lambda value, holder: finding)


def refused(text: str, unless: Callable[[Any, Any], bool] = lambda value, holder: False) -> Rule:
    finding = Finding(Fate.REFUSED, text)
    return Rule(
        Fate.REFUSED, text, lambda value, holder: None if unless(value, holder) else finding
    )


def _platform(value: str, holder: Message) -> Finding | None:
    if value in ENGINES_BY_PLATFORM:
        return None
    known = _PLATFORM_TEXTS.get(value.partition("_")[0])
    text = (
        known or f"'{value[:80]}' is {NOT_SERVED}, expected one of {', '.join(ENGINES_BY_PLATFORM)}"
    )
    return Finding(Fate.REFUSED, text)


def _parameters(value: Any, holder: Message) -> Finding | None:
    unknown = sorted(
        key for key in value if key not in ENGINE_PARAMETERS and not is_compile_key(key)
    )
    if not unknown:
        return None
    names = ", ".join(f"'{key[:80]}'" for key in unknown[:5]) + (", ..." if unknown[5:] else "")
    return Finding(Fate.HARMLESS, f"{names} not known; docs/compile.md lists those that are")


def _gpu_accelerators(value: Any, holder: Message) -> Finding | None:
    for judge, fate in ((accelerator_refusal, Fate.REFUSED), (accelerator_warning, Fate.HARMLESS)):
        text = next(filter(None, map(judge, value)), None)
        if text is not None:
            return Finding(fate, text)
    return None


def _is_identity(value: Any, holder: Any) -> bool:
    return list(value.shape) == list(holder.dims)


_NO_GPU = "this server runs models on the CPU"
_ENGINE_TUNES = "the engine tunes itself"
_TENSORRT_ONLY = f"tensors in TensorRT's own layouts are {NOT_SERVED}"
_SHAPE_TENSOR = f"TensorRT shape tensors are {NOT_SERVED}"
_RESHAPE = f"a reshape that changes the shape is {NOT_SERVED}; declare the model file's own shape"
_BATCH_TENSOR = f"tensors computed from the batch are {NOT_SERVED}"

FIELDS: dict[str, Rule] = {
    "name": honoured(),
    "platform": honoured(_platform),
    "backend": honoured(_platform),
    "runtime": harmless("engines are built in, no backend library is loaded"),
    "version_policy.latest.num_versions": honoured(),
    "version_policy.all": honoured(),
    "version_policy.specific.versions": honoured(),
    "max_batch_size": honoured(),
    "input.name": honoured(),
    "input.data_type": honoured(),
    "input.format": harmless("a hint, shapes are served as declared"),
    "input.dims": honoured(),
    "input.reshape": refused(_RESHAPE, unless=_is_identity),
    "input.is_shape_tensor": refused(_SHAPE_TENSOR),
    "input.allow_ragged_batch": refused(f"ragged batches are {NOT_SERVED}"),
    "input.optional": honoured(),
    "input.is_non_linear_format_io": refused(_TENSORRT_ONLY),
    "output.name": honoured(),
    "output.data_type": honoured(),
    "output.dims": honoured(),
    "output.reshape": refused(_RESHAPE, unless=_is_identity),
    "output.label_filename": honoured(),
    "output.is_shape_tensor": refused(_SHAPE_TENSOR),
    "output.is_non_linear_format_io": refused(_TENSORRT_ONLY),
    "batch_input": refused(_BATCH_TENSOR),
    "batch_output": refused(_BATCH_TENSOR),
    "optimization.graph": harmless(_ENGINE_TUNES),
    "optimization.priority": harmless("models share the CPU as equals"),
    "optimization.cuda": harmless(_NO_GPU),
    "optimization.execution_accelerators.gpu_execution_accelerator": honoured(_gpu_accelerators),
    "optimization.execution_accelerators.gpu_execution_accelerator.name": honoured(),
    "optimization.execution_accelerators.gpu_execution_accelerator.parameters": honoured(),
    "optimization.execution_accelerators.cpu_execution_accelerator": harmless(
        "ONNX Runtime runs its CPU provider alone"
    ),
    "optimization.input_pinned_memory.enable": harmless(_NO_GPU),
    "optimization.output_pinned_memory.enable": harmless(_NO_GPU),
    "optimization.gather_kernel_buffer_threshold": harmless(_NO_GPU),
    "optimization.eager_batching": harmless("a batch is assembled when an instance is free"),
    "dynamic_batching": honoured(),
    "dynamic_batching.preferred_batch_size": honoured(),
    "dynamic_batching.max_queue_delay_microseconds": honoured(),
    "dynamic_batching.preserve_ordering": harmless(
        "a stream's answers always keep their order, and separate calls have none"
    ),
    "dynamic_batching.priority_levels": honoured(),
    "dynamic_batching.default_priority_level": honoured(),
    "dynamic_batching.default_queue_policy.timeout_action": honoured(),
    "dynamic_batching.default_queue_policy.default_timeout_microseconds": honoured(),
    "dynamic_batching.default_queue_policy.allow_timeout_override": honoured(),
    "dynamic_batching.default_queue_policy.max_queue_size": honoured(),
    "dynamic_batching.priority_queue_policy.timeout_action": honoured(),
    "dynamic_batching.priority_queue_policy.default_timeout_microseconds": honoured(),
    "dynamic_batching.priority_queue_policy.allow_timeout_override": honoured(),
    "dynamic_batching.priority_queue_policy.max_queue_size": honoured(),
    "sequence_batching": refused(f"models with sequences are {NOT_SERVED}"),
    "ensemble_scheduling": refused(f"ensembles are {NOT_SERVED}"),
    "instance_group.name": harmless("instances have no names"),
    "instance_group.kind": honoured(),
    "instance_group.count": honoured(),
    "instance_group.rate_limiter": harmless("an instance runs whenever it has work"),
    "instance_group.gpus": honoured(),
    "instance_group.secondary_devices": harmless("there are no other devices than GPUs"),
    "instance_group.profile": harmless("the profile is chosen by the shapes of each run"),
    "instance_group.passive": refused(f"passive instances are {NOT_SERVED}"),
    "instance_group.host_policy": harmless("instances are not bound to CPUs or memory nodes"),
    "default_model_filename": honoured(),
    "cc_model_filenames": harmless(_NO_GPU),
    "metric_tags": harmless("metrics carry the model's name and version only"),
    "parameters": honoured(_parameters),
    "parameters.string_value": honoured(),
    "model_warmup": honoured(),
    "model_warmup.name": honoured(),
    "model_warmup.batch_size": honoured(),
    "model_warmup.inputs": honoured(),
    "model_warmup.inputs.data_type": honoured(),
    "model_warmup.inputs.dims": honoured(),
    "model_warmup.inputs.zero_data": honoured(),
    "model_warmup.inputs.random_data": honoured(),
    "model_warmup.inputs.input_data_file": honoured(),
    "model_warmup.count": honoured(),
    "model_operations.op_library_filename": refused(f"custom operators are {NOT_SERVED}"),
    "model_transaction_policy.decoupled": refused(f"decoupled models are {NOT_SERVED}"),
    # An agent may check or decrypt the model: leaving it out in silence would drop a safeguard.
    "model_repository_agents.agents": refused(f"models with repository agents are {NOT_SERVED}"),
    "response_cache.enable": harmless("every request is computed"),
    "model_metrics": harmless("histogram layouts are fixed"),
}


def check_fields(config: ModelConfig) -> tuple[str, ...]:
    """Warnings about the fields that have no effect, e.g. "optimization.cuda is ignored: ...".

    Raises RepositoryError naming the fields for which the model must not be served.
    """
    found = list(_findings(config, "", ""))
    refusals = [f"{place}: {finding.text}" for place, finding in found if _refuses(finding)]
    if refusals:
        raise RepositoryError(f"model '{config.name}': {'; '.join(_limited(refusals))}")
    return tuple(_limited([f"{place} is ignored: {finding.text}" for place, finding in found]))


def _refuses(finding: Finding) -> bool:
    return finding.fate is Fate.REFUSED


def _limited(texts: Sequence[str]) -> list[str]:
    more = len(texts) - FINDINGS_MAX
    return [*texts[:FINDINGS_MAX], *([f"and {more} more"] if more > 0 else [])]


def _findings(message: Message, path: str, place: str) -> Iterator[tuple[str, Finding]]:
    """What is set below one message. `path` leads to its row; `place` has indexes, for people."""
    for field, value in message.ListFields():
        rule = FIELDS.get(f"{path}{field.name}")
        finding = rule.judge(value, message) if rule else None
        if finding is not None:
            yield f"{place}{field.name}", finding
        if field.message_type is not None and (rule is None or rule.fate is Fate.HONOURED):
            for child, child_place in _children(value, f"{place}{field.name}"):
                yield from _findings(child, f"{path}{field.name}.", f"{child_place}.")


def _children(value: Any, place: str) -> Iterator[tuple[Message, str]]:
    if isinstance(value, Message):
        yield value, place
    elif isinstance(value, Mapping):
        for key in sorted(value):
            if isinstance(value[key], Message):
                yield value[key], f"{place}[{key}]"
    else:
        yield from ((element, f"{place}[{index}]") for index, element in enumerate(value))
