# SPDX-License-Identifier: Apache-2.0
"""From a message to a request: the one place where what a caller sent is checked.

Afterwards nobody looks at the message again. Where tensor data lies in memory that the caller can
still write, the request holds a view of it; `copy_first` names those that must be copied before
they are used, because the model reads them as indices or sizes.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from thirdrail import dtypes, tensors
from thirdrail.dtypes import BYTES
from thirdrail.errors import InvalidArgument
from thirdrail.tensors import Array, TensorSpec
from thirdrail.v1 import inference_pb2, tensor_pb2

INPUTS_MAX = 64

ViewOf = Callable[[str, tensor_pb2.ArenaRef], "np.typing.NDArray[np.uint8]"]


@dataclass(frozen=True, slots=True)
class VersionSpec:
    """What a model version accepts and gives. Where it batches, shapes include the rows."""

    model: str
    version: int
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    batch_rows_max: int  # 0: the model does not batch
    positional_inputs: frozenset[str]
    labels: Mapping[str, tuple[str, ...]]  # class names, for outputs that have them


@dataclass(frozen=True, slots=True)
class WantedOutput:
    name: str
    as_values: bool
    class_count: int  # 0: the tensor itself


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A checked request. Two requests are never equal: each is its own."""

    call: int
    request_id: str
    inputs: Mapping[str, Array]
    copy_first: tuple[str, ...]
    outputs: tuple[WantedOutput, ...]
    rows: int  # 1 where the model does not batch
    signature: tuple[object, ...]  # requests with different ones never share a batch
    input_bytes: int


def read_request(
    message: inference_pb2.InferRequest, spec: VersionSpec, view_of: ViewOf
) -> Request:
    """Check a message against the model.

    Raises InvalidArgument or FailedPrecondition with the text for the caller.
    """
    _check_names(message, spec)
    inputs: dict[str, Array] = {}
    copy_first: list[str] = []
    rows = input_bytes = 0
    all_values = True
    for tensor in message.inputs:
        name, form = tensor.name, tensor.WhichOneof("data")
        expected = spec.inputs[name]
        rows = _check_shape(tensor, expected, spec, rows)
        inputs[name] = array = _read_data(tensor, form, expected, spec, view_of)
        input_bytes += array.nbytes
        all_values = all_values and form == "values"
        if form == "ref" and name not in spec.positional_inputs and expected.dtype is not BYTES:
            copy_first.append(name)
    return Request(
        call=message.call,
        request_id=message.request_id,
        inputs=inputs,
        copy_first=tuple(copy_first),
        outputs=_wanted_outputs(message, spec, as_values=all_values),
        rows=rows or 1,
        signature=_signature(inputs, spec),
        input_bytes=input_bytes,
    )


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


def _check_shape(
    tensor: tensor_pb2.Tensor, expected: TensorSpec, spec: VersionSpec, rows: int
) -> int:
    """The request's rows; 0 where the model does not batch."""
    if tensor.data_type != expected.dtype.value:
        row = dtypes.BY_VALUE.get(tensor.data_type)
        raise InvalidArgument(
            f"inference input '{tensor.name}' data-type is "
            f"'{row.name if row else tensor.data_type}', but model '{spec.model}' expects "
            f"'{expected.dtype.name}'"
        )
    shape = tuple(tensor.shape)
    tensors.element_count(tensor.name, shape)
    if len(shape) != len(expected.shape) or any(
        want not in (-1, got) for got, want in zip(shape, expected.shape, strict=True)
    ):
        raise InvalidArgument(
            f"unexpected shape for input '{tensor.name}' for model '{spec.model}'. Expected "
            f"{shape_text(expected.shape)}, got {shape_text(shape)}."
        )
    if not spec.batch_rows_max:
        return 0
    if rows and shape[0] != rows:
        raise InvalidArgument(
            f"input '{tensor.name}' batch size does not match other inputs for '{spec.model}'"
        )
    if shape[0] > spec.batch_rows_max or shape[0] < 1:
        limit = f"<= {spec.batch_rows_max}" if shape[0] else ">= 1"
        raise InvalidArgument(
            f"inference request batch-size must be {limit} for '{spec.model}', got {shape[0]}"
        )
    return shape[0]


def _read_data(
    tensor: tensor_pb2.Tensor,
    form: str | None,
    expected: TensorSpec,
    spec: VersionSpec,
    view_of: ViewOf,
) -> Array:
    if form == "values":
        return tensors.array_of_values(tensor.name, expected.dtype, tensor.shape, tensor.values)
    shape = tuple(tensor.shape)
    count = tensors.element_count(tensor.name, shape)
    if form is None and count:
        raise InvalidArgument(
            f"unable to find data for input tensor '{tensor.name}' for model '{spec.model}' in "
            "request."
        )
    data = view_of(tensor.name, tensor.ref) if form == "ref" else tensor.raw
    if expected.dtype is BYTES:
        # Copied before it is looked at: its lengths are read more than once.
        whose = f" for inference input '{tensor.name}' for model '{spec.model}'"
        return dtypes.object_array(dtypes.decode_bytes(bytes(data), count, whose), shape)
    needed = count * expected.dtype.itemsize
    if len(data) != needed:
        raise InvalidArgument(
            f"input byte size mismatch for input '{tensor.name}' for model '{spec.model}'. "
            f"Expected {needed}, got {len(data)}"
        )
    return np.frombuffer(data, expected.dtype.numpy).reshape(shape)


def _wanted_outputs(
    message: inference_pb2.InferRequest, spec: VersionSpec, *, as_values: bool
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
        asked[output.name] = output
    forms = {
        inference_pb2.OUTPUT_FORM_UNSPECIFIED: as_values,
        inference_pb2.OUTPUT_FORM_RAW: False,
        inference_pb2.OUTPUT_FORM_VALUES: True,
    }
    return tuple(
        WantedOutput(name, forms.get(asked[name].form, as_values), asked[name].class_count)
        for name in spec.outputs
        if name in asked
    )


@functools.lru_cache(maxsize=1024)
def _all_outputs(names: tuple[str, ...], as_values: bool) -> tuple[WantedOutput, ...]:
    return tuple(WantedOutput(name, as_values, 0) for name in names)


def _signature(inputs: Mapping[str, Array], spec: VersionSpec) -> tuple[object, ...]:
    if not spec.batch_rows_max:
        return ()
    return tuple((name, inputs[name].shape[1:]) for name in spec.inputs if name in inputs)


def shape_text(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"
