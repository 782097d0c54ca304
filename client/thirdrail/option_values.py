# SPDX-License-Identifier: Apache-2.0
"""What the options of a request may be, checked before a message is filled with them.

A message would take some wrong values in silence, and refuses others without the option's name.
"""

from collections.abc import Collection, Mapping
from operator import index
from typing import SupportsIndex

import numpy as np

from thirdrail.errors import InvalidArgument
from thirdrail.v1 import inference_pb2 as pb

TIMEOUT_S_MAX = 1e9  # 30 years; gRPC's own clock overflows at 300


def require_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidArgument(f"{what} must be a str, got {_shown(value)}")


def require_whole_numbers(**options: object) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, SupportsIndex):
            raise InvalidArgument(f"{name} must be an int, got {_shown(value)}")
        if index(value) < 0:
            raise InvalidArgument(f"{name} must be 0 or more, got {value}")


def require_outputs(outputs: object) -> None:
    """Names that can be gone through more than once, for a call may be sent twice."""
    if isinstance(outputs, str) or not isinstance(outputs, Collection):
        raise InvalidArgument(f"outputs must be a sequence of names, got {_shown(outputs)}")
    for name in outputs:
        require_text("the name of an output", name)


def require_timeout(timeout: object) -> None:
    """Raises InvalidArgument for one that no clock takes: one of FP32 has steps of 128 s today."""
    if timeout is None:
        return
    if not isinstance(timeout, int | float | np.integer):
        raise InvalidArgument(f"timeout must be a float or an int, got {_shown(timeout)}")
    if not 0 < timeout <= TIMEOUT_S_MAX:
        raise InvalidArgument(
            f"timeout must be above 0 and at most {TIMEOUT_S_MAX:g} seconds, got {timeout}; None "
            "waits for ever"
        )


def require_parameters(parameters: object) -> None:
    if not isinstance(parameters, Mapping):
        raise InvalidArgument(
            f"parameters must be a mapping from names to values, got {_shown(parameters)}"
        )
    for name in parameters:
        require_text("the name of a parameter", name)


def parameter(name: str, value: object) -> pb.Parameter:
    """Raises InvalidArgument for a value of another type, or of more than 64 bits."""
    match value.item() if isinstance(value, np.generic) else value:
        case bool() as flag:
            return pb.Parameter(bool_value=flag)
        case int() as number:
            return _whole_number(name, number)
        case float() as number:
            return pb.Parameter(double_value=number)
        case str() as text:
            return pb.Parameter(string_value=text)
    raise InvalidArgument(f"parameter '{name}' must be bool, int, float or str, got {_type(value)}")


def cannot_be_sent(error: ValueError) -> InvalidArgument:
    """Of a number that a message's field does not hold, or text that UTF-8 does not."""
    return InvalidArgument(f"an option of the request cannot be sent: {error}")


def _whole_number(name: str, value: int) -> pb.Parameter:
    if -(1 << 63) <= value < 1 << 63:
        return pb.Parameter(int_value=value)
    if 0 < value < 1 << 64:
        return pb.Parameter(uint_value=value)
    raise InvalidArgument(f"parameter '{name}' must fit 64 bits, got {value}")


def _shown(value: object) -> str:
    return f"the {_type(value)} {value!r:.100}"


def _type(value: object) -> str:
    return type(value).__name__
