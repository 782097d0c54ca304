# SPDX-License-Identifier: Apache-2.0
"""The rules for a ModelInferRequest's parameter maps: which keys exist, of which type each is."""

from collections.abc import Mapping
from dataclasses import dataclass

from thirdrail.errors import InvalidArgument
from thirdrail.v1 import inference_pb2
from thirdrail_server.inference import grpc_service_pb2 as kserve

_EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"
_RESERVED_PREFIX = "triton_"
_REGION = "shared_memory_region"
_REGION_OFFSET = "shared_memory_offset"
_REGION_SIZE = "shared_memory_byte_size"
_CLASSIFICATION = "classification"

_PRIORITY_MAX = (1 << 32) - 1
_CLASS_COUNT_MAX = (1 << 32) - 1

# Sequences are not served; their keys have rules all the same, as clients send them to any model.
_TYPES: dict[str, tuple[str, ...]] = {
    "sequence_id": ("int64_param", "uint64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "priority": ("int64_param", "uint64_param"),
    "timeout": ("int64_param", "uint64_param"),
    _EMPTY_FINAL_RESPONSE: ("bool_param",),
}

_VALUE_FIELD = {
    "bool_param": "bool_value",
    "int64_param": "int_value",
    "string_param": "string_value",
    "double_param": "double_value",
    "uint64_param": "uint_value",
}

Parameters = Mapping[str, kserve.InferParameter]


@dataclass(frozen=True, slots=True)
class RegionRange:
    """What a request says about a tensor in a region. Any numbers: nothing is checked yet."""

    region: str
    offset: int
    byte_size: int


def apply_request_parameters(parameters: Parameters, request: inference_pb2.InferRequest) -> None:
    """Sets priority (1 is the highest), timeout_us and the custom parameters of `request`.

    Raises InvalidArgument for a reserved key, a value of the wrong type, or a number out of range.
    """
    for key, parameter in parameters.items():
        value_type = parameter.WhichOneof("parameter_choice")
        _check_request_parameter(key, value_type)
        assert value_type is not None
        value = getattr(parameter, value_type)
        if key == "priority":
            request.priority = _checked(key, value, _PRIORITY_MAX)
        elif key == "timeout":
            request.timeout_us = _checked(key, value, (1 << 63) - 1)
        elif key != _EMPTY_FINAL_RESPONSE:  # each request here has one response and it is final
            setattr(request.parameters[key], _VALUE_FIELD[value_type], value)


def _check_request_parameter(key: str, value_type: str | None) -> None:
    allowed = _TYPES.get(key)
    if allowed is None and key.startswith(_RESERVED_PREFIX):
        raise InvalidArgument(
            f"parameter '{key}' is reserved: of the keys that start with '{_RESERVED_PREFIX}' a "
            f"request may set '{_EMPTY_FINAL_RESPONSE}' alone"
        )
    if value_type is None:
        raise InvalidArgument(f"parameter '{key}' has no value")
    if allowed is not None and value_type not in allowed:
        raise InvalidArgument(
            f"invalid value type for '{key}' parameter, expected {' or '.join(allowed)}."
        )


def _checked(key: str, value: int, value_max: int) -> int:
    if not 0 <= value <= value_max:
        raise InvalidArgument(
            f"invalid value for '{key}' parameter, expected 0 to {value_max}, got {value}"
        )
    return value


def region_range(tensor: str, parameters: Parameters) -> RegionRange | None:
    """Where in a shared-memory region a tensor is to be read or written; None: in the message.

    Raises InvalidArgument for a wrong type, an offset or size without a region, and a region
    without a size.
    """
    if not parameters:
        return None
    _require_type(tensor, parameters, _REGION, "string_param")
    for key in (_REGION_OFFSET, _REGION_SIZE):
        _require_type(tensor, parameters, key, "int64_param")
        if key in parameters and _REGION not in parameters:
            raise InvalidArgument(
                f"'{key}' can not be specified without '{_REGION}' parameter for tensor '{tensor}'"
            )
    if _REGION not in parameters:
        return None
    if _REGION_SIZE not in parameters:
        raise InvalidArgument(
            f"'{_REGION_SIZE}' must be specified along with '{_REGION}' parameter for tensor "
            f"'{tensor}'"
        )
    offset = parameters[_REGION_OFFSET].int64_param if _REGION_OFFSET in parameters else 0
    size = parameters[_REGION_SIZE].int64_param
    return RegionRange(parameters[_REGION].string_param, offset, size)


def _require_type(tensor: str, parameters: Parameters, key: str, expected: str) -> None:
    if key in parameters and parameters[key].WhichOneof("parameter_choice") != expected:
        raise InvalidArgument(
            f"invalid value type for '{key}' parameter for tensor '{tensor}', expected {expected}."
        )


def class_count(tensor: str, parameters: Parameters) -> int:
    """How many classes of an output are wanted; 0: the tensor itself.

    Raises InvalidArgument for the wrong type, a count below 1, or a count together with a region.
    """
    if not parameters or _CLASSIFICATION not in parameters:
        return 0
    _require_type(tensor, parameters, _CLASSIFICATION, "int64_param")
    if _REGION in parameters:
        raise InvalidArgument(f"output can't set both '{_REGION}' and '{_CLASSIFICATION}'")
    count = parameters[_CLASSIFICATION].int64_param
    if not 1 <= count <= _CLASS_COUNT_MAX:
        raise InvalidArgument(
            f"invalid value for '{_CLASSIFICATION}' parameter for tensor '{tensor}', expected at "
            f"least 1, got {count}"
        )
    return count
