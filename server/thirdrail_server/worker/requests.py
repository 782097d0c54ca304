# SPDX-License-Identifier: Apache-2.0
"""From a message to a request: the one place where what a caller sent is checked.

Afterwards nobody looks at the message again. Where tensor data lies in memory that the caller can
still write, the request holds a view of it; `copy_first` names those that must be copied before
they are used, because the model reads them as indices or sizes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from thirdrail import dtypes, tensors
from thirdrail.dtypes import BYTES
from thirdrail.errors import InvalidArgument
from thirdrail.tensors import Array, TensorSpec
from thirdrail.v1 import inference_pb2, tensor_pb2
from thirdrail_server.worker.device_regions import RegionPart
from thirdrail_server.worker.device_tensors import DeviceBytes, DeviceTensor
from thirdrail_server.worker.large_texts import LargeText
from thirdrail_server.worker.run_place import INLINE_INPUT_BYTES_MAX
from thirdrail_server.worker.version_spec import VersionSpec
from thirdrail_server.worker.wanted_outputs import PartOf, WantedOutput, wanted_outputs

INPUTS_MAX = 64
SHAPES_REMEMBERED_MAX = 256  # per model version

ViewOf = Callable[[str, tensor_pb2.ArenaRef], "np.typing.NDArray[np.uint8] | DeviceBytes"]


@dataclass(slots=True, eq=False)  # not frozen: that makes it three times as long in the making
class Request:
    """A checked request. Two requests are never equal: each is its own."""

    call: int
    request_id: str
    inputs: Mapping[str, Array]  # in the model's order
    copy_first: tuple[str, ...]
    outputs: tuple[WantedOutput, ...]
    rows: int  # 1 where the model does not batch
    signature: tuple[object, ...]  # requests with different ones never share a batch
    input_bytes: int
    # Inputs whose elements are still in a region, or are not taken apart yet, and the arrays of
    # `inputs` that stand for them.
    fetches: tuple[tuple[RegionPart | LargeText, Array], ...] = ()


def no_part(ref: tensor_pb2.RegionRef) -> RegionPart:
    raise InvalidArgument("only the front's requests refer to shared memory regions")


def read_request(
    message: inference_pb2.InferRequest,
    spec: VersionSpec,
    view_of: ViewOf,
    part_of: PartOf = no_part,
) -> Request:
    """Check a message against the model.

    Raises NotFound, InvalidArgument or FailedPrecondition with the text for the caller.
    """
    tensors_in: Sequence[tensor_pb2.Tensor] = message.inputs
    if [tensor.name for tensor in tensors_in] != spec.input_names:
        tensors_in = _in_the_models_order(message, spec)
    inputs: dict[str, Array] = {}
    copy_first: list[str] = []
    fetches: list[tuple[RegionPart | LargeText, Array]] = []
    rows = input_bytes = 0
    all_values = True
    for tensor in tensors_in:
        name, form, shape = tensor.name, tensor.WhichOneof("data"), tuple(tensor.shape)
        expected = spec.inputs[name]
        count = spec.good_shapes.get((name, tensor.data_type, shape))
        if count is None:
            count = _count_of_new_shape(tensor, shape, expected, spec)
        if spec.batch_rows_max:
            rows = _check_rows(name, shape[0], rows, spec)
        if form == "region":
            array = _room_for(tensor, shape, count, expected, spec)
            fetches.append((part_of(tensor.region), array))
        else:
            array = _read_data(tensor, form, shape, count, expected, spec, view_of, fetches)
        inputs[name] = array
        input_bytes += array.nbytes
        if form != "values":
            all_values = False
        # Where our view is read-only the caller cannot write either; BYTES are copies already.
        is_shared = form == "ref" and array.flags.writeable and expected.dtype is not BYTES
        if is_shared and name not in spec.positional_inputs:
            copy_first.append(name)
    if fetches:  # of texts the arrays have nothing yet
        input_bytes += sum(len(part) for part, _ in fetches if isinstance(part, LargeText))
    return Request(
        message.call,
        message.request_id,
        inputs,
        tuple(copy_first),
        wanted_outputs(message, spec, part_of, as_values=all_values),
        rows or 1,
        _signature(inputs, spec) if spec.batch_rows_max else (),
        input_bytes,
        tuple(fetches) if fetches else (),
    )


def _in_the_models_order(
    message: inference_pb2.InferRequest, spec: VersionSpec
) -> list[tensor_pb2.Tensor]:
    """So that requests whose inputs have the same shapes look the same to whoever comes after."""
    _check_names(message, spec)
    places = {name: place for place, name in enumerate(spec.input_names)}
    return sorted(message.inputs, key=lambda tensor: places[tensor.name])


def _check_names(message: inference_pb2.InferRequest, spec: VersionSpec) -> None:
    names = [tensor.name for tensor in message.inputs]
    if len(names) > INPUTS_MAX:
        raise InvalidArgument(f"a request takes at most {INPUTS_MAX} inputs, got {len(names)}")
    if len(names) == len(spec.inputs) and spec.inputs.keys() == set(names):
        return  # all of them, each once
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidArgument(f"input '{name}' already exists in request")
        seen.add(name)
    required = [name for name, expected in spec.inputs.items() if not expected.optional]
    missing = [name for name in required if name not in seen]
    unexpected = next((name for name in names if name not in spec.inputs), None)
    # As in Triton, what is missing goes first: a name that is wrong counts as missing, and is only
    # called unexpected where nothing else is.
    if missing or len(names) > len(spec.inputs):
        raise InvalidArgument(_count_text(spec, names, required, missing))
    if unexpected is not None:
        raise InvalidArgument(f"unexpected inference input '{unexpected}' for model '{spec.model}'")


def _count_text(
    spec: VersionSpec, names: list[str], required: list[str], missing: list[str]
) -> str:
    if len(required) == len(spec.inputs):
        expected = f"expected {len(required)} inputs but got {len(names)} inputs"
    else:
        expected = (
            f"expected number of inputs between {len(required)} and {len(spec.inputs)} but got "
            f"{len(names)} inputs"
        )
    got = ",".join(f"'{name}'" for name in names)
    text = f"{expected} for model '{spec.model}'. Got input(s) [{got}]"
    if not missing:
        return f"{text}."
    lacking = ",".join(f"'{name}'" for name in missing)
    return (
        f"{text}, but missing required input(s) [{lacking}]. Please provide all required input(s)."
    )


def _count_of_new_shape(
    tensor: tensor_pb2.Tensor, shape: tuple[int, ...], expected: TensorSpec, spec: VersionSpec
) -> int:
    """How many elements the tensor has, if its type and shape are what the model takes."""
    _check_shape(tensor, shape, expected, spec)
    count = tensors.element_count(tensor.name, shape)
    if len(spec.good_shapes) < SHAPES_REMEMBERED_MAX:
        spec.good_shapes[expected.name, tensor.data_type, shape] = count
    return count


def _check_shape(
    tensor: tensor_pb2.Tensor, shape: tuple[int, ...], expected: TensorSpec, spec: VersionSpec
) -> None:
    if tensor.data_type != expected.dtype.value:
        row = dtypes.BY_VALUE.get(tensor.data_type)
        raise InvalidArgument(
            f"inference input '{tensor.name}' data-type is "
            f"'{row.name if row else tensor.data_type}', but model '{spec.model}' expects "
            f"'{expected.dtype.name}'"
        )
    tensors.element_count(tensor.name, shape)
    if len(shape) != len(expected.shape) or any(
        want not in (-1, got) for got, want in zip(shape, expected.shape, strict=True)
    ):
        raise InvalidArgument(
            f"unexpected shape for input '{tensor.name}' for model '{spec.model}'. Expected "
            f"{shape_text(expected.shape)}, got {shape_text(shape)}."
        )


def _check_rows(name: str, rows: int, rows_before: int, spec: VersionSpec) -> int:
    """The request's rows, which all of its inputs share."""
    if rows_before and rows != rows_before:
        raise InvalidArgument(
            f"input '{name}' batch size does not match other inputs for '{spec.model}'"
        )
    if rows > spec.batch_rows_max or rows < 1:
        limit = f"<= {spec.batch_rows_max}" if rows else ">= 1"
        raise InvalidArgument(
            f"inference request batch-size must be {limit} for '{spec.model}', got {rows}"
        )
    return rows


def _read_data(
    tensor: tensor_pb2.Tensor,
    form: str | None,
    shape: tuple[int, ...],
    count: int,
    expected: TensorSpec,
    spec: VersionSpec,
    view_of: ViewOf,
    fetches: list[tuple[RegionPart | LargeText, Array]],
) -> Array:
    """fetches: what is to be done yet is added there."""
    if form == "values":
        return tensors.array_of_values(tensor.name, expected.dtype, shape, tensor.values)
    if form is None and count:
        raise InvalidArgument(
            f"unable to find data for input tensor '{tensor.name}' for model '{spec.model}' in "
            "request."
        )
    data: Any = tensor.raw
    if form == "ref":
        data = view_of(tensor.name, tensor.ref)
        if isinstance(data, DeviceBytes):
            return _on_device(tensor, data, shape, count, expected, spec)
    if expected.dtype is BYTES:
        whose = f" for inference input '{tensor.name}' for model '{spec.model}'"
        text = LargeText(data, count, whose)
        if len(text) <= INLINE_INPUT_BYTES_MAX:
            return text.elements(shape)
        array = np.broadcast_to(np.empty((), object), shape)  # takes no memory
        fetches.append((text, array))
        return array
    _check_size(tensor, len(data), count, expected, spec)
    array = np.frombuffer(data, expected.dtype.numpy)
    return array if len(shape) == 1 else array.reshape(shape)


def _room_for(
    tensor: tensor_pb2.Tensor,
    shape: tuple[int, ...],
    count: int,
    expected: TensorSpec,
    spec: VersionSpec,
) -> Array:
    """Memory of ours for an input that is in a region, to be filled when its turn comes."""
    if expected.dtype is BYTES:
        raise InvalidArgument(
            f"input '{tensor.name}' for model '{spec.model}' is BYTES, which are read on the host: "
            "send them in the request or in system shared memory"
        )
    _check_size(tensor, tensor.region.size, count, expected, spec)
    return np.empty(shape, expected.dtype.numpy)


def _check_size(
    tensor: tensor_pb2.Tensor, size: int, count: int, expected: TensorSpec, spec: VersionSpec
) -> None:
    needed = count * expected.dtype.itemsize
    if size != needed:
        raise InvalidArgument(
            f"input byte size mismatch for input '{tensor.name}' for model '{spec.model}'. "
            f"Expected {needed}, got {size}"
        )


def _on_device(
    tensor: tensor_pb2.Tensor,
    data: DeviceBytes,
    shape: tuple[int, ...],
    count: int,
    expected: TensorSpec,
    spec: VersionSpec,
) -> Array:
    """A tensor which this module treats as an array."""
    if expected.dtype is BYTES or expected.dtype.numpy is None:
        raise InvalidArgument(
            f"input '{tensor.name}' for model '{spec.model}' is {expected.dtype.name}, which "
            "cannot lie on a device"
        )
    _check_size(tensor, len(data), count, expected, spec)
    return cast("Array", DeviceTensor(data.address, expected.dtype.numpy, shape))


def _signature(inputs: Mapping[str, Array], spec: VersionSpec) -> tuple[object, ...]:
    return tuple((name, inputs[name].shape[1:]) for name in spec.inputs if name in inputs)


def shape_text(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"
