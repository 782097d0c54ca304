# SPDX-License-Identifier: Apache-2.0
"""A config.pbtxt that says what the server derived, for its owner to keep or to change."""

from google.protobuf import text_format
from google.protobuf.message import Message

from thirdrail_server.inference.grpc_service_pb2 import ModelConfig

_FROM_MODEL_FILE = "# Read from the model file."
_NOTES = {
    "platform": _FROM_MODEL_FILE,
    "backend": _FROM_MODEL_FILE,
    "input": _FROM_MODEL_FILE,
    "output": _FROM_MODEL_FILE,
    "max_batch_size": (
        "# Derived: up to so many rows, run singly and together, gave the same answers.\n"
        "# The first dimension of every tensor counts rows; dims below leave it out."
    ),
    "dynamic_batching": "# Derived: requests that wait at the same time share a batch.",
    "version_policy": "# Default: the highest version.",
    "instance_group": "# Default: one instance on each GPU, or on the CPU where there is none.",
    "default_model_filename": "# Default.",
}
_NO_BATCHING = (
    "# Batching is off: each request runs alone. To turn it on, set max_batch_size, take the\n"
    "# dimension for rows out of all dims, and add dynamic_batching {}."
)


def suggest_config_text(whole: ModelConfig, given: ModelConfig | None) -> str:
    """A config.pbtxt equal to the completed `whole`; comments mark what `given` did not say.

    Parsed again for the same model it gives `whole`.
    """
    stated = {field.name for field, _ in given.ListFields()} if given is not None else set()
    parts = [f"# The configuration in force for model '{whole.name}'."]
    for field, _ in whole.ListFields():
        note = _NOTES.get(field.name) if field.name not in stated else None
        parts.append("\n".join(filter(None, (note, _field_text(whole, field.name)))))
    if whole.max_batch_size == 0:
        parts.append(_NO_BATCHING)
    return "\n\n".join(parts) + "\n"


def _field_text(whole: ModelConfig, name: str) -> str:
    part: Message = ModelConfig()
    part.CopyFrom(whole)
    for field, _ in whole.ListFields():
        if field.name != name:
            part.ClearField(field.name)
    return text_format.MessageToString(part).rstrip()
