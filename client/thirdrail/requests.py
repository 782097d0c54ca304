# SPDX-License-Identifier: Apache-2.0
"""Building requests and reading answers: what both clients and streams share, without any I/O."""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypedDict, Unpack

from thirdrail import dtypes, failures, tensors
from thirdrail.arrays import array_of_value, has_dtype
from thirdrail.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ThirdrailError,
    Unimplemented,
)
from thirdrail.models import ModelDescription
from thirdrail.option_values import (
    cannot_be_sent,
    parameter,
    require_outputs,
    require_parameters,
    require_text,
    require_timeout,
    require_whole_numbers,
)
from thirdrail.tensors import Array, TensorSpec
from thirdrail.v1 import inference_pb2 as pb

# A mapping from input names to anything that numpy can read; a model with one input takes the value
# alone.
Inputs = Mapping[str, Any] | Any
ParameterValue = bool | int | float | str


class InferOptions(TypedDict, total=False):
    """Everything that a request may say beside its model and inputs."""

    outputs: Sequence[str] | None  # the outputs wanted; none: all
    version: int  # 0: the newest one that is ready
    request_id: str | None  # given back in the result and written to the server's log
    timeout: float | None  # seconds until TimedOut is raised; none: wait
    priority: int  # 1 is the highest; 0: the model's default
    parameters: Mapping[str, ParameterValue] | None
    classes: int | None  # the best N classes as b"value:index[:label]" instead of each output
    borrow: bool  # over the lane, the arrays are views of the server's memory until released


class Lease(Protocol):
    """Memory that a result's arrays show and that somebody waits for."""

    def release(self) -> None: ...


class Result(Mapping[str, Array]):
    """The outputs of one request by name, in the model's order. The arrays are read-only.

    BYTES outputs are object arrays of bytes. Arrays of a borrowed result (`infer(borrow=True)` over
    the lane) lie in memory that the server needs again: leave a `with` block around the result, or
    call `release`, and do not look at them afterwards; or let go of all of them.
    """

    __slots__ = ("_arrays", "_lease", "_response")

    def __init__(
        self,
        response: pb.InferResponse,
        arrays: dict[str, Array] | None = None,
        lease: Lease | None = None,
    ) -> None:
        if arrays is None:
            arrays = {tensor.name: _read_only(tensor) for tensor in response.outputs}
            response = _without_outputs(response)
        self._arrays: dict[str, Array] | None = arrays
        self._response = response
        self._lease = lease

    @property
    def model_name(self) -> str:
        return self._response.model_name

    @property
    def model_version(self) -> int:
        """The one that ran."""
        return self._response.model_version

    @property
    def request_id(self) -> str:
        return self._response.request_id

    @property
    def timing(self) -> pb.Timing:
        """Where the time went, in nanoseconds."""
        return self._response.timing

    @property
    def parameters(self) -> dict[str, ParameterValue]:
        return {
            name: getattr(value, value.WhichOneof("value") or "bool_value")
            for name, value in self._response.parameters.items()
        }

    @property
    def is_borrowed(self) -> bool:
        """Whether memory of the server waits for `release`."""
        return self._lease is not None

    def release(self) -> None:
        """Let go of the arrays. Those of a borrowed result must not be used any more, wherever they
        are: their memory will hold another result. May be called twice.
        """
        self._arrays = None
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __getitem__(self, name: str) -> Array:
        return self._held()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held())

    def __len__(self) -> int:
        return len(self._held())

    def __reduce__(self) -> "tuple[Any, ...]":
        """Pickles and copies have arrays of their own, also those of a borrowed result."""
        arrays = {name: array.copy() for name, array in self._held().items()}
        return _with_own_arrays, (self._response, arrays)

    def __repr__(self) -> str:
        whose = f"Result of {self.model_name} version {self.model_version}"
        if self._arrays is None:
            return f"<{whose}: released>"
        arrays = ", ".join(f"{n}: {a.dtype}{list(a.shape)}" for n, a in self._arrays.items())
        return f"<{whose}: {arrays}>"

    def _held(self) -> dict[str, Array]:
        if self._arrays is None:
            raise FailedPrecondition("this result was released: its arrays are gone")
        return self._arrays


def _with_own_arrays(response: pb.InferResponse, arrays: dict[str, Array]) -> Result:
    for array in arrays.values():
        array.flags.writeable = False
    return Result(response, arrays)


def needs_description(inputs: Inputs, options: InferOptions) -> bool:
    """Whether the model's declaration is needed to build this request."""
    if options.get("classes") and not options.get("outputs"):
        return True
    if not isinstance(inputs, Mapping):
        return True
    return not all(map(has_dtype, inputs.values()))


def write_request(
    request: pb.InferRequest,
    model: str,
    inputs: Inputs,
    description: ModelDescription | None,
    **options: Unpack[InferOptions],
) -> None:
    """Fills in an empty request, which may be part of a stream's message. See `write_options`."""
    write_options(request, model, description, **options)
    for name, array in named_arrays(inputs, description).items():
        try:
            require_text("the name of an input", name)
            dtype, data = dtypes.dtype_of_array(array), tensors.bytes_of_array(array)
        except InvalidArgument as error:
            raise InvalidArgument(f"input '{name}': {error}") from None
        # Filled in place: appending a finished tensor would copy its bytes once more.
        request.inputs.add(name=name, data_type=dtype.value, shape=array.shape, raw=bytes(data))


def write_options(
    request: pb.InferRequest,
    model: str,
    description: ModelDescription | None,
    *,
    outputs: Sequence[str] | None = None,
    version: int = 0,
    request_id: str | None = None,
    timeout: float | None = None,
    priority: int = 0,
    parameters: Mapping[str, ParameterValue] | None = None,
    classes: int | None = None,
    borrow: bool = False,
    **unknown: object,
) -> None:
    """Fills in everything but the inputs.

    description: needed where `needs_description` says so.
    borrow: says nothing to the server.
    Raises InvalidArgument for values that cannot be sent, TypeError for an option of another name.
    """
    for name in unknown:
        known = ", ".join(InferOptions.__annotations__)
        raise TypeError(f"'{name}' is no option of a request, expected one of {known}")
    require_text("the name of a model", model)
    require_whole_numbers(version=version, priority=priority, classes=classes or 0)
    require_outputs(outputs or ())
    require_parameters(parameters or {})
    if request_id is not None:
        require_text("request_id", request_id)
    if classes and not outputs:
        assert description is not None
        outputs = [spec.name for spec in description.outputs]
    request.timeout_us = _microseconds(timeout)
    try:
        request.model_name = model
        request.model_version = version
        request.request_id = request_id or ""
        request.priority = priority
        for name in outputs or ():
            request.outputs.add(name=name, class_count=classes or 0)
        for name, value in (parameters or {}).items():
            request.parameters[name].CopyFrom(parameter(name, value))
    except ValueError as error:
        raise cannot_be_sent(error) from None


def outcome_of_answer(answer: pb.InferResponse) -> Result | ThirdrailError:
    """What one answer of a stream means for the request that it answers."""
    if answer.status.reason:
        return failures.error_of_status(answer.status)
    if not answer.final:
        return Unimplemented(f"model '{answer.model_name}' answers in parts, expected one answer")
    return outcome_of_response(answer)


def outcome_of_response(response: pb.InferResponse) -> Result | ThirdrailError:
    """The result, or the error for a response that makes no sense."""
    try:
        return Result(response)
    except InvalidArgument as error:
        return Internal(f"the server's answer cannot be read: {error}")


def named_arrays(inputs: Inputs, description: ModelDescription | None) -> dict[str, Array]:
    """The arrays to send, by input. Raises InvalidArgument for what cannot be one."""
    if not isinstance(inputs, Mapping):
        assert description is not None
        inputs = {only_input(description).name: inputs}
    specs = {spec.name: spec for spec in description.inputs} if description else {}
    return {
        name: array_of_value(name, value, _spec_for(name, value, specs))
        for name, value in inputs.items()
    }


def _spec_for(name: str, value: object, specs: Mapping[str, TensorSpec]) -> TensorSpec | None:
    spec = specs.get(name)
    if spec is None and not has_dtype(value):
        raise InvalidArgument(f"unknown input '{name}', the model has {', '.join(specs)}")
    return spec


def only_input(description: ModelDescription) -> TensorSpec:
    """Raises InvalidArgument for a model that has several."""
    if len(description.inputs) != 1:
        names = ", ".join(spec.name for spec in description.inputs)
        raise InvalidArgument(
            f"model '{description.status.name}' has {len(description.inputs)} inputs ({names}): "
            "pass a mapping from their names to arrays"
        )
    return description.inputs[0]


def _microseconds(timeout: float | None) -> int:
    require_timeout(timeout)
    return 0 if timeout is None else max(1, round(timeout * 1e6))


def _read_only(tensor: Any) -> Array:
    array = tensors.array_of_tensor(tensor)
    if array.flags.writeable:
        array.flags.writeable = False
    return array


def _without_outputs(response: pb.InferResponse) -> pb.InferResponse:
    """The rest of it, so that a result does not keep its tensors' bytes twice."""
    rest = pb.InferResponse(
        model_name=response.model_name,
        model_version=response.model_version,
        request_id=response.request_id,
        timing=response.timing,
    )
    for name, value in response.parameters.items():
        rest.parameters[name].CopyFrom(value)
    return rest
