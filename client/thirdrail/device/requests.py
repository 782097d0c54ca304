# SPDX-License-Identifier: Apache-2.0
"""Requests with tensors on a device, without any I/O: what `Device` and its asyncio twin share."""

from collections.abc import Mapping, Sequence
from typing import Any

from thirdrail.device.arrays import DeviceArray
from thirdrail.errors import InvalidArgument
from thirdrail.models import ModelDescription
from thirdrail.requests import InferOptions, Inputs, named_arrays, only_input, write_options
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2

WORKER_PREFIX = "cuda:"  # of the names of workers that compute on a device, before its UUID


def uuid_of(name: str) -> str:
    """What a caller means by a name of a device. "" is the server's first."""
    return "" if name == "cuda" else name


def worker_with(uuid: str, workers: Sequence[str]) -> str | None:
    """The worker that computes on the device; None: the server's first, which says if it does not.

    workers: of the server, the first one first. uuid: or a beginning of one.
    """
    wanted = (WORKER_PREFIX + uuid).lower()
    named = [each for each in workers if each.lower().startswith(wanted)]
    return named[0] if named and named[0] != workers[0] else None


def device_request(
    model: str,
    inputs: Inputs,
    description: ModelDescription,
    on_host: Sequence[str],
    options: InferOptions,
) -> tuple[inference_pb2.InferRequest, dict[str, Array | DeviceArray]]:
    """A request without its inputs and its place, and the inputs.

    on_host: the outputs that are not to be on the device.
    Raises InvalidArgument for what cannot be sent, and for an output that is not wanted.
    """
    if options.get("outputs") is None:
        options = {**options, "outputs": [spec.name for spec in description.outputs]}
    head = inference_pb2.InferRequest()
    write_options(head, model, description, **options)
    _require_wanted(on_host, [output.name for output in head.outputs])
    for output in head.outputs:
        output.on_device = output.name not in on_host
    if not isinstance(inputs, Mapping):
        inputs = {only_input(description).name: inputs}
    here = {name: value for name, value in inputs.items() if isinstance(value, DeviceArray)}
    others: dict[str, Any] = {name: inputs[name] for name in inputs if name not in here}
    return head, {**here, **named_arrays(others, description)}


def _require_wanted(on_host: Sequence[str], outputs: Sequence[str]) -> None:
    if isinstance(on_host, str):
        raise InvalidArgument(f"on_host must be a sequence of names, got the string '{on_host}'")
    for name in on_host:
        if name not in outputs:
            raise InvalidArgument(
                f"on_host has '{name}', expected some of the request's outputs: "
                f"{', '.join(outputs)}"
            )
