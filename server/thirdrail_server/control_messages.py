# SPDX-License-Identifier: Apache-2.0
"""What front and worker tell each other on the control channel: types and their JSON forms."""

import base64
import binascii
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from thirdrail.errors import Internal
from thirdrail.v1 import models_pb2
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig

Fields = dict[str, Any]
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class LoadCommand:
    """Load these versions of a model, all or none of them, in place of what it has."""

    name: str
    config: ModelConfig | None  # None: everything is read from the model
    versions: tuple[tuple[int, Path], ...]  # number, where it lies
    takes_stopgap: bool = False  # what can serve at once will do, where the best has to be built
    memory_bytes_max: int = 0  # all engines of the worker together may hold so much; 0: no matter
    instances: int = 0  # on the worker's device; 0: as the configuration says

    def to_fields(self) -> Fields:
        return {
            "name": self.name,
            "config": None if self.config is None else message_to_text(self.config),
            "versions": [[version, str(path)] for version, path in self.versions],
            "takes_stopgap": self.takes_stopgap,
            "memory_bytes_max": self.memory_bytes_max,
            "instances": self.instances,
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> "LoadCommand":
        """Raises Internal when the fields are not those of `to_fields`."""
        try:
            config = fields["config"]
            return cls(
                str(fields["name"]),
                None if config is None else message_of_text(ModelConfig, config),
                tuple((int(version), Path(path)) for version, path in fields["versions"]),
                bool(fields["takes_stopgap"]),
                int(fields["memory_bytes_max"]),
                int(fields["instances"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Internal(f"a load command that cannot be read: {error!r}") from None


@dataclass(frozen=True, slots=True)
class VersionEngine:
    """What runs one version, and how it came to be."""

    name: str  # "onnxruntime"
    reason: str = ""  # why it is not the engine of first choice; empty when it is
    report: models_pb2.EngineReport = field(default_factory=models_pb2.EngineReport)
    is_stopgap: bool = False  # it serves until the engine of first choice is built and proven

    def to_fields(self) -> Fields:
        return {
            "name": self.name,
            "reason": self.reason,
            "report": message_to_text(self.report),
            "is_stopgap": self.is_stopgap,
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> "VersionEngine":
        """Raises KeyError, TypeError or ValueError when the fields are not those of `to_fields`."""
        return cls(
            str(fields["name"]),
            str(fields["reason"]),
            message_of_text(models_pb2.EngineReport, fields["report"]),
            bool(fields["is_stopgap"]),
        )


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What came of a load."""

    config: ModelConfig  # complete: derived fields are filled in
    versions: dict[int, str | None]  # version -> why it failed; None: it is ready
    in_place: dict[int, list[str]] = field(default_factory=dict)  # version -> inputs bound in place
    warnings: list[str] = field(default_factory=list)
    engines: dict[int, VersionEngine] = field(default_factory=dict)  # version -> what runs it

    @property
    def ready_versions(self) -> list[int]:
        return [version for version, failure in self.versions.items() if failure is None]

    @property
    def reservations(self) -> list[str]:
        """What is not as the configuration has it, for the log."""
        failures = ((v, text) for v, text in self.versions.items() if text is not None)
        return [*(f"version {v} is not served: {text}" for v, text in failures), *self.warnings]

    def to_fields(self) -> Fields:
        return {
            "config": message_to_text(self.config),
            "versions": [[version, failure] for version, failure in self.versions.items()],
            "in_place": [[version, names] for version, names in self.in_place.items()],
            "warnings": self.warnings,
            "engines": [[version, each.to_fields()] for version, each in self.engines.items()],
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> "LoadedModel":
        """Raises Internal when the fields are not those of `to_fields`."""
        try:
            return cls(
                message_of_text(ModelConfig, fields["config"]),
                {int(v): None if text is None else str(text) for v, text in fields["versions"]},
                {int(v): [str(name) for name in names] for v, names in fields["in_place"]},
                [str(warning) for warning in fields["warnings"]],
                {int(v): VersionEngine.from_fields(each) for v, each in fields["engines"]},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Internal(f"a loaded model that cannot be read: {error!r}") from None


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load has come: as a whole, and within its phase. 0 steps: nobody knows."""

    phase: str  # "reading", "building", "proving", "warming up", "ready", and words of builders
    step: int = 0
    steps: int = 0
    phase_step: int = 0
    phase_steps: int = 0
    is_building: bool = False  # another process is at work, and this one waits

    def to_fields(self) -> Fields:
        return dataclasses.asdict(self)

    @classmethod
    def from_fields(cls, fields: Fields) -> "LoadProgress":
        """Never fails: a report that makes no sense is one without content."""
        phase = fields.get("phase")
        numbers = map(fields.get, ("step", "steps", "phase_step", "phase_steps"))
        step, steps, phase_step, phase_steps = (
            n if isinstance(n, int) and 0 <= n < 1 << 32 else 0 for n in numbers
        )
        text = phase if isinstance(phase, str) else ""
        is_building = fields.get("is_building") is True
        return cls(text, step, steps, phase_step, phase_steps, is_building)


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that is loaded, as far as memory is concerned."""

    name: str
    size: int  # bytes
    used_ms: int  # when it was loaded or last answered, in milliseconds of the unix clock
    is_busy: bool = False  # requests wait or run, or it is being loaded or unloaded


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """What a worker's engines hold."""

    residents: list[Resident]
    leaving_bytes: int  # of engines that were replaced or unloaded and still finish requests
    shared_bytes: int = 0  # which models on a device compute in

    @property
    def total(self) -> int:
        return self.leaving_bytes + self.shared_bytes + sum(each.size for each in self.residents)

    def to_fields(self) -> Fields:
        return {
            "residents": [dataclasses.astuple(each) for each in self.residents],
            "leaving_bytes": self.leaving_bytes,
            "shared_bytes": self.shared_bytes,
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> "WorkerMemory":
        """Raises Internal when the fields are not those of `to_fields`."""
        try:
            residents = [
                Resident(str(name), int(size), int(used_ms), bool(is_busy))
                for name, size, used_ms, is_busy in fields["residents"]
            ]
            return cls(residents, int(fields["leaving_bytes"]), int(fields["shared_bytes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Internal(f"figures of memory that cannot be read: {error!r}") from None


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """A worker expects a client with this token."""

    session: int
    token: bytes
    token_life_ms: int

    def to_fields(self) -> Fields:
        token = base64.b64encode(self.token).decode()
        return {"session": self.session, "token": token, "token_life_ms": self.token_life_ms}

    @classmethod
    def from_fields(cls, fields: Fields) -> "OpenedSession":
        """Raises Internal when the fields are not those of `to_fields`."""
        try:
            token = base64.b64decode(fields["token"], validate=True)
            return cls(int(fields["session"]), token, int(fields["token_life_ms"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Internal(f"an opened session that cannot be read: {error!r}") from None


def message_to_text(message: Message) -> str:
    return base64.b64encode(message.SerializeToString()).decode()


def message_of_text(kind: type[M], text: Any) -> M:
    """Raises ValueError for anything that `message_to_text` did not write."""
    if not isinstance(text, str):
        raise ValueError(f"expected base64 text, got {type(text).__name__}")
    message = kind()
    try:
        message.ParseFromString(base64.b64decode(text, validate=True))
    except (binascii.Error, DecodeError) as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from None
    return message
