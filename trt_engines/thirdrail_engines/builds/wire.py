# SPDX-License-Identifier: Apache-2.0
"""What a build's two processes say to each other: JSON objects, one a line.

Down goes one order. Up come any number of progress lines, then a result or a refusal. The process
that builds runs strangers' models, so what comes up is read as untrusted input: every field has a
type and a bound, and whatever fits none is a ValueError.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thirdrail_engines.builds.result import PlanTensor
from thirdrail_engines.expectations import ProofLimits, ReferenceRequest
from thirdrail_engines.plans import (
    Builder,
    BuildFault,
    PlanRequest,
    Precision,
    Profile,
    ShapeRange,
)
from thirdrail_engines.trials import ValueRange

LINE_BYTES_MAX = 1 << 20
NAME_CHARS_MAX = 1000
TEXT_CHARS_MAX = 4000
ENTRIES_MAX = 10_000  # of a list or mapping: kinds of layers, tensors, warnings
_NUMBER_MAX = 1 << 62
_RANK_MAX = 64
_CONVERSION_CHARS_MAX = 256 << 10


@dataclass(frozen=True, slots=True)
class Order:
    """What the child is told. folder: its own, for its result and all else that it writes."""

    request: PlanRequest | ReferenceRequest
    folder: Path


@dataclass(frozen=True, slots=True)
class Progress:
    phase: str
    done: int
    steps: int


@dataclass(frozen=True, slots=True)
class Result:
    plan_name: str  # a file in the child's folder: the plan, or what a reference expects
    layers: Mapping[str, int]
    source_layers: Mapping[str, int]
    tensors: tuple[PlanTensor, ...]
    conversion: Mapping[str, object] | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    fault: BuildFault
    text: str


Answer = Progress | Result | Refusal


def write_order(order: Order) -> bytes:
    request = order.request
    if isinstance(request, ReferenceRequest):
        return _line({"reference": _plain_reference(request), "folder": str(order.folder)})
    return _line(
        {
            "source": str(request.source.absolute()),
            "builder": request.builder,
            "builder_version": request.builder_version,
            "precision": request.precision,
            "converter": request.converter,
            "rules": request.rules,
            "profiles": [_plain_profile(profile) for profile in request.profiles],
            "compute_capabilities": request.compute_capabilities,
            "target": request.target,
            "workspace_bytes": request.workspace_bytes,
            "optimization_level": request.optimization_level,
            "is_version_compatible": request.is_version_compatible,
            "is_refittable": request.is_refittable,
            "plugins": [str(plugin.absolute()) for plugin in request.plugins],
            "uses_timing_cache": request.uses_timing_cache,
            "threads_max": request.threads_max,
            "folder": str(order.folder),
        }
    )


def read_order(line: bytes) -> Order:
    """From our own parent, hence unchecked."""
    fields: dict[str, Any] = json.loads(line)
    folder = Path(fields.pop("folder"))
    if "reference" in fields:
        return Order(_reference(fields["reference"]), folder)
    fields["source"] = Path(fields["source"])
    fields["builder"] = Builder(fields["builder"])
    fields["precision"] = Precision(fields["precision"])
    fields["profiles"] = tuple(_profile(profile) for profile in fields["profiles"])
    fields["compute_capabilities"] = tuple(fields["compute_capabilities"])
    fields["plugins"] = tuple(Path(plugin) for plugin in fields["plugins"])
    return Order(PlanRequest(**fields), folder)


def write_answer(answer: Answer) -> bytes:
    match answer:
        case Progress():
            return _line({"progress": [answer.phase, answer.done, answer.steps]})
        case Refusal():
            return _line({"refusal": [answer.fault, answer.text[:TEXT_CHARS_MAX]]})
        case Result():
            result = {
                "plan": answer.plan_name,
                "layers": dict(answer.layers),
                "source_layers": dict(answer.source_layers),
                "tensors": [[t.name, t.dtype, t.shape, t.is_input] for t in answer.tensors],
                "conversion": answer.conversion and dict(answer.conversion),
                "warnings": [text[:TEXT_CHARS_MAX] for text in answer.warnings],
            }
            return _line({"result": result})


def read_answer(line: bytes) -> Answer:
    """Raises ValueError for anything that `write_answer` would not have written."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("a line nested too deeply") from None
    match message:
        case {"progress": [phase, done, steps], **rest} if not rest:
            return Progress(_text(phase, NAME_CHARS_MAX), _number(done), _number(steps))
        case {"refusal": [fault, text], **rest} if not rest:
            return Refusal(BuildFault(_text(fault, NAME_CHARS_MAX)), _text(text, TEXT_CHARS_MAX))
        case {"result": dict() as result, **rest} if not rest:
            return _result(result)
    raise ValueError("a line that is neither progress, result nor refusal")


def presentable(text: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    """Without what would move a terminal's cursor or forge lines of a log."""
    return "".join(c if c.isprintable() else " " for c in text[:chars_max]).strip()


def _line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _plain_profile(profile: Profile) -> dict[str, list[list[int]]]:
    return {
        name: [list(shapes.smallest), list(shapes.best), list(shapes.largest)]
        for name, shapes in profile.inputs.items()
    }


def _profile(plain: Mapping[str, list[list[int]]]) -> Profile:
    return Profile(
        {name: ShapeRange(*(tuple(shape) for shape in shapes)) for name, shapes in plain.items()}
    )


def _plain_reference(request: ReferenceRequest) -> dict[str, object]:
    return {
        "source": str(request.source.absolute()),
        "plan": str(request.plan.absolute()) if request.plan else None,
        "profiles": [_plain_profile(profile) for profile in request.profiles],
        "values": {name: [each.lowest, each.highest] for name, each in request.values.items()},
        "limits": dataclasses.asdict(request.limits),
        "threads_max": request.threads_max,
        "times": request.times,
    }


def _reference(fields: Mapping[str, Any]) -> ReferenceRequest:
    return ReferenceRequest(
        Path(fields["source"]),
        Path(fields["plan"]) if fields["plan"] else None,
        tuple(_profile(profile) for profile in fields["profiles"]),
        {name: ValueRange(*ends) for name, ends in fields["values"].items()},
        ProofLimits(**fields["limits"]),
        fields["threads_max"],
        fields["times"],
    )


def _result(fields: Mapping[str, object]) -> Result:
    match fields:
        case {
            "plan": plan,
            "layers": layers,
            "source_layers": source_layers,
            "tensors": tensors,
            "conversion": conversion,
            "warnings": warnings,
        } if len(fields) == 6:
            return Result(
                _file_name(plan),
                _counts(layers),
                _counts(source_layers),
                tuple(_tensor(tensor) for tensor in _list(tensors)),
                _conversion(conversion),
                tuple(_text(warning, TEXT_CHARS_MAX) for warning in _list(warnings)),
            )
    raise ValueError("a result with other fields than those of a result")


def _file_name(value: object) -> str:
    name = _text(value, 255)
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"a plan with the name {name!r}, expected that of a file in the folder")
    return name


def _tensor(value: object) -> PlanTensor:
    match value:
        case [name, dtype, list() as shape, bool() as is_input] if len(shape) <= _RANK_MAX:
            dims = tuple(_number(dim, at_least=-1) for dim in shape)
            return PlanTensor(
                _text(name, NAME_CHARS_MAX), _text(dtype, NAME_CHARS_MAX), dims, is_input
            )
    raise ValueError("a tensor that is none")


def _counts(value: object) -> dict[str, int]:
    if not isinstance(value, dict) or len(value) > ENTRIES_MAX:
        raise ValueError("layers that are no counts by name, or too many")
    return {_text(name, NAME_CHARS_MAX): _number(count) for name, count in value.items()}


def _conversion(value: object) -> Mapping[str, object] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(json.dumps(value)) > _CONVERSION_CHARS_MAX:
        raise ValueError("a conversion report that is no object, or too long")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list) or len(value) > ENTRIES_MAX:
        raise ValueError("a list that is none, or too long")
    return value


def _text(value: object, chars_max: int) -> str:
    if not isinstance(value, str) or len(value) > chars_max:
        raise ValueError(f"a text that is none, or longer than {chars_max} characters")
    return presentable(value, chars_max)


def _number(value: object, at_least: int = 0) -> int:
    if type(value) is not int or not at_least <= value <= _NUMBER_MAX:
        raise ValueError(f"a number that is none, or not within {at_least} to {_NUMBER_MAX}")
    return value
