# SPDX-License-Identifier: Apache-2.0
"""Which outputs a request wants, in which form and where: checked against the model."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from thirdrail.dtypes import BYTES
from thirdrail.errors import InvalidArgument
from thirdrail.v1 import inference_pb2, tensor_pb2
from thirdrail_server.worker.device_regions import RegionPart
from thirdrail_server.worker.version_spec import VersionSpec

PartOf = Callable[[tensor_pb2.RegionRef], RegionPart]


@dataclass(frozen=True, slots=True)
class WantedOutput:
    name: str
    as_values: bool
    class_count: int  # 0: the tensor itself
    region: RegionPart | None = None  # where its elements go, instead of into the response
    on_device: bool = False  # in a piece of the session's memory there


def wanted_outputs(
    message: inference_pb2.InferRequest, spec: VersionSpec, part_of: PartOf, *, as_values: bool
) -> tuple[WantedOutput, ...]:
    """In the model's order, whatever the order of asking."""
    if not message.outputs:
        return _all_outputs(tuple(spec.outputs), as_values)
    asked: dict[str, inference_pb2.RequestedOutput] = {}
    for output in message.outputs:
        if output.name not in spec.outputs:
            raise InvalidArgument(
                f"unexpected inference output '{output.name}' for model '{spec.model}'"
            )
        if output.name in asked:
            raise InvalidArgument(f"output '{output.name}' already exists in request")
        if output.class_count and spec.outputs[output.name].dtype is BYTES:
            raise InvalidArgument(
                "class result not available for output due to unsupported type 'BYTES'"
            )
        if output.on_device:
            _check_on_device(output, message, spec)
        asked[output.name] = output
    forms = {
        inference_pb2.OUTPUT_FORM_UNSPECIFIED: as_values,
        inference_pb2.OUTPUT_FORM_RAW: False,
        inference_pb2.OUTPUT_FORM_VALUES: True,
    }
    return tuple(
        WantedOutput(
            name,
            forms.get(asked[name].form, as_values),
            asked[name].class_count,
            part_of(asked[name].region) if asked[name].HasField("region") else None,
            asked[name].on_device,
        )
        for name in spec.outputs
        if name in asked
    )


def _check_on_device(
    output: inference_pb2.RequestedOutput, message: inference_pb2.InferRequest, spec: VersionSpec
) -> None:
    if not message.event_place:
        raise InvalidArgument(
            f"output '{output.name}' is wanted on the device, which needs an event_place, and that "
            "a session on the lane"
        )
    dtype = spec.outputs[output.name].dtype
    if output.class_count or dtype is BYTES or dtype.numpy is None:
        what = "a class result" if output.class_count else dtype.name
        raise InvalidArgument(f"output '{output.name}' is {what}, which cannot lie on a device")


@functools.lru_cache(maxsize=1024)
def _all_outputs(names: tuple[str, ...], as_values: bool) -> tuple[WantedOutput, ...]:
    return tuple(WantedOutput(name, as_values, 0) for name in names)
