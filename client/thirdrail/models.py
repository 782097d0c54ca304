# SPDX-License-Identifier: Apache-2.0
"""What the server says about its models, as plain values."""

from collections.abc import Callable
from dataclasses import dataclass, field

from thirdrail import dtypes
from thirdrail.errors import InvalidArgument, NotFound, ThirdrailError, Unavailable
from thirdrail.failures import with_note
from thirdrail.option_values import require_text
from thirdrail.tensors import TensorSpec
from thirdrail.v1 import models_pb2 as pb
from thirdrail.v1 import tensor_pb2

_STATE_PREFIX = "MODEL_STATE_"
NS_PER_S = 1e9


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One version of one model."""

    name: str
    version: int  # 0: no version is known
    state: str  # "loading", "ready", "unloading" or "unavailable"
    reason: str  # why it is not ready; or, while it is, why the last reload failed
    engine: str  # what runs it, e.g. "onnxruntime"
    worker: str  # which worker runs it, e.g. "cpu"; several: their names, with commas
    is_expected_back: bool = False  # not ready because its worker died; it will be loaded again
    engine_reason: str = ""  # why it is not the engine of first choice; empty when it is
    load_phase: str = ""  # of a load under way, e.g. "building"
    workers: tuple[str, ...] = ()  # those that serve it now

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"


def error_of_missing(status: ModelStatus, version: int = 0) -> ThirdrailError:
    """What it means that a worker did not find a model that the server knows: in the words that a
    call over gRPC gets, where the front looks the same up. version: as asked for, 0 for any."""
    if status.state == "unavailable" and not status.is_expected_back:
        if version:
            place = f"'{status.name}' version {version}"
            return Unavailable(
                f"Request for unknown model: {place} is not at ready state: {status.reason}"
            )
        why = f": {status.reason}" if status.reason.startswith("evicted ") else ""
        return NotFound(
            f"Request for unknown model: '{status.name}' has no available versions{why}"
        )
    return Unavailable(f"model '{status.name}' was not ready when the request came")


@dataclass(frozen=True, slots=True)
class ModelChange:
    """One message of a watch: the state of a version at its start, or a change since."""

    status: ModelStatus
    initial: bool


@dataclass(frozen=True, slots=True)
class OutputProof:
    """How far an output was from that of the reference on the CPU, for seeded inputs."""

    output: str
    max_abs_error: float
    mean_abs_error: float
    cosine: float  # 1: the same direction
    max_rel_error: float  # as a part of the largest magnitude of the output
    mean_rel_error: float  # as a part of its mean magnitude
    equal: float  # of what is no float, the part that was equal
    not_finite: int  # elements that were NaN or infinite, and something else in the reference
    compared: int  # elements; 0: the figures say nothing, and the configuration allows that


@dataclass(frozen=True, slots=True)
class EngineReport:
    """How the engine of a version came to be."""

    plan_key: str = ""  # of its plan in the cache; empty: it runs the model file itself
    is_cache_hit: bool = False  # else the plan was built for this load
    build_s: float = 0.0  # of the build, whenever that was
    precision: str = ""  # what the graph was converted to before; empty: nothing
    proofs: tuple[OutputProof, ...] = ()  # none: there is nothing to compare it with
    proof_reference: str = ""  # with proofs: what it was compared with, "onnxruntime" or "torch"


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as its callers need to know it."""

    status: ModelStatus
    ready_versions: tuple[int, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_rows_max: int  # 0: the model does not batch
    instances: int
    config_pbtxt: str  # the whole configuration in force, derived fields included
    warnings: tuple[str, ...]  # configuration fields that have no effect
    inputs_in_place: tuple[str, ...]  # read by the engine where the caller put them
    engine_report: EngineReport = field(default_factory=EngineReport)


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load has come: `step` of `steps`, called `phase`, and how far within that."""

    phase: str
    step: int
    steps: int
    phase_step: int = 0
    phase_steps: int = 0  # 0: nobody knows


def require_declaration(description: ModelDescription, version: int) -> None:
    """For who needs the inputs: a model that is not loaded may have none to tell.

    Raises what `error_of_missing` says.
    """
    if not description.inputs and not description.status.is_ready:
        raise with_note(error_of_missing(description.status, version))


class DescriptionCache:
    """Descriptions by model and version. A reload may change them, so none is used for long."""

    ENTRIES_MAX = 1024
    AGE_NS_MAX = 5_000_000_000

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int], tuple[int, ModelDescription]] = {}

    def get(self, model: str, version: int, now_ns: int) -> ModelDescription | None:
        """`now_ns`: monotonic."""
        put_ns, description = self._entries.get((model, version), (None, None))
        if put_ns is None or now_ns - put_ns > self.AGE_NS_MAX:
            return None
        return description

    def put(self, model: str, version: int, description: ModelDescription, now_ns: int) -> None:
        if len(self._entries) >= self.ENTRIES_MAX:
            self._entries.clear()
        self._entries[model, version] = now_ns, description

    def forget_older(self, model: str, version: int, than_ns: int) -> bool:
        """Whether one was there that is older; it is gone then."""
        put_ns, _ = self._entries.get((model, version), (than_ns, None))
        return put_ns < than_ns and self._entries.pop((model, version), None) is not None


OnProgress = Callable[[LoadProgress], None]


def describe_request(model: str, version: int) -> pb.DescribeRequest:
    """Raises InvalidArgument for a name or a number that no model has."""
    require_text("the name of a model", model)
    try:
        return pb.DescribeRequest(name=model, version=version)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"no model is called {model!r:.100} or has the version {version!r:.100}, expected a "
            f"str and an int of 64 bits: {error}"
        ) from None


def status_of_message(message: pb.ModelStatus) -> ModelStatus:
    return ModelStatus(
        name=message.name,
        version=message.version,
        state=_state_name(message.state),
        reason=message.reason,
        engine=message.engine,
        worker=message.worker,
        is_expected_back=message.is_expected_back,
        engine_reason=message.engine_reason,
        load_phase=message.load_phase,
        workers=tuple(message.workers),
    )


def change_of_message(message: pb.WatchResponse) -> ModelChange:
    return ModelChange(status_of_message(message.status), message.initial)


def description_of_message(message: pb.DescribeResponse) -> ModelDescription:
    return ModelDescription(
        status=status_of_message(message.status),
        ready_versions=tuple(message.ready_versions),
        inputs=tuple(map(spec_of_message, message.inputs)),
        outputs=tuple(map(spec_of_message, message.outputs)),
        batch_rows_max=message.batch_rows_max,
        instances=message.instances,
        config_pbtxt=message.config_pbtxt,
        warnings=tuple(message.warnings),
        inputs_in_place=tuple(message.inputs_in_place),
        engine_report=report_of_message(message.engine_report),
    )


def report_of_message(message: pb.EngineReport) -> EngineReport:
    return EngineReport(
        plan_key=message.plan_key,
        is_cache_hit=message.is_cache_hit,
        build_s=message.build_ns / NS_PER_S,
        precision=message.precision,
        proofs=tuple(map(_proof_of_message, message.proofs)),
        proof_reference=message.proof_reference,
    )


def _proof_of_message(message: pb.OutputProof) -> OutputProof:
    return OutputProof(
        output=message.output,
        max_abs_error=message.max_abs_error,
        mean_abs_error=message.mean_abs_error,
        cosine=message.cosine,
        max_rel_error=message.max_rel_error,
        mean_rel_error=message.mean_rel_error,
        equal=message.equal,
        not_finite=message.not_finite,
        compared=message.compared,
    )


def spec_of_message(message: tensor_pb2.TensorSpec) -> TensorSpec:
    dtype = dtypes.dtype_of_value(message.data_type)
    return TensorSpec(message.name, dtype, tuple(message.shape), message.optional)


def progress_of_message(message: pb.LoadResponse) -> LoadProgress:
    return LoadProgress(
        message.phase, message.step, message.steps, message.phase_step, message.phase_steps
    )


def _state_name(state: int) -> str:
    try:
        name = pb.ModelState.Name(pb.ModelState.ValueType(state))
    except ValueError:  # from a newer server
        return f"state {state}"
    return name.removeprefix(_STATE_PREFIX).lower()
