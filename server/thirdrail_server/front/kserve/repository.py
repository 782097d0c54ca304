# SPDX-License-Identifier: Apache-2.0
"""The repository calls: the index, and what the parameters of a load or unload mean.

Which files may be uploaded, of what size and where to, is for the model control to say.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from thirdrail.errors import Internal, InvalidArgument, NotFound, Unavailable, Unimplemented
from thirdrail.v1 import models_pb2
from thirdrail_server.front.control.access import ControlIsOff
from thirdrail_server.front.control.served_model import ServedModel
from thirdrail_server.inference import grpc_service_pb2 as kserve
from thirdrail_server.repository.model_config import parse_json

_FILE_PREFIX = "file:"

_STATES: dict[models_pb2.ModelState.ValueType, str] = {
    models_pb2.MODEL_STATE_LOADING: "LOADING",
    models_pb2.MODEL_STATE_READY: "READY",
    models_pb2.MODEL_STATE_UNLOADING: "UNLOADING",
    models_pb2.MODEL_STATE_UNAVAILABLE: "UNAVAILABLE",
}

Parameters = Mapping[str, kserve.ModelRepositoryParameter]
ModelIndex = kserve.RepositoryIndexResponse.ModelIndex


@dataclass(frozen=True, slots=True)
class LoadOverrides:
    """What a load request brings along in place of what the repository holds."""

    config: kserve.ModelConfig | None
    files: dict[str, bytes]  # by path below the model's folder


@contextmanager
def refusals_as_known() -> Iterator[None]:
    """Inside, a server without model control refuses as KServe's clients expect it to."""
    try:
        yield
    except ControlIsOff as error:
        raise Unavailable(error.message) from None


@contextmanager
def load_failures_as_known(model: str) -> Iterator[None]:
    """Inside, a load of `model` fails as KServe's clients expect it to."""
    try:
        with refusals_as_known():
            yield
    except NotFound as error:
        raise Internal(
            f"failed to load '{model}', failed to poll from model repository: {error}"
        ) from None


def refuse_repository_name(name: str) -> None:
    if name:
        raise Unimplemented("'repository_name' specification is not supported")


def model_index(model: ServedModel) -> Iterator[ModelIndex]:
    """One line per version; where none is known, one line without a version. The reason of one
    that serves is why its last reload failed, or why it is not on the engine of first choice."""
    for status in model.versions:
        yield ModelIndex(
            name=model.name,
            version=str(status.version) if status.version else "",
            state=_STATES.get(status.state, "UNKNOWN"),
            reason=status.reason or model.engine_reason(status.version),
        )


def load_overrides(model: str, parameters: Parameters) -> LoadOverrides:
    """What the parameters of a load of `model` ask for.

    Raises InvalidArgument for an unknown key, a wrong type, a config that describes no model, and
    files without a config.
    """
    config = None
    files: dict[str, bytes] = {}
    for key, parameter in parameters.items():
        if key == "config":
            _require_type(key, parameter, "string_param")
            config = parse_json(parameter.string_param.encode(), model)
        elif key.startswith(_FILE_PREFIX):
            _require_type(key, parameter, "bytes_param")
            files[key.removeprefix(_FILE_PREFIX)] = parameter.bytes_param
        else:
            raise InvalidArgument(f"unrecognized load parameter '{key}'.")
    if files and config is None:
        raise InvalidArgument(
            "a 'file:' parameter needs a 'config' parameter beside it, which describes the model"
        )
    return LoadOverrides(config, files)


def check_unload(parameters: Parameters) -> None:
    """Raises InvalidArgument for an unknown key or a wrong type; no model here has dependents."""
    for key, parameter in parameters.items():
        if key != "unload_dependents":
            raise InvalidArgument(f"unrecognized unload parameter '{key}'.")
        _require_type(key, parameter, "bool_param")


def _require_type(key: str, parameter: kserve.ModelRepositoryParameter, expected: str) -> None:
    if parameter.WhichOneof("parameter_choice") != expected:
        raise InvalidArgument(
            f"invalid value type for repository parameter '{key}', expected {expected}."
        )
