# SPDX-License-Identifier: Apache-2.0
"""State and rules of the trace and log settings.

Trace settings are kept and given back, as clients expect; this server writes no traces. A change is
applied as a whole or, when any part of it is refused, not at all.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from thirdrail.errors import InvalidArgument, Unimplemented
from thirdrail_server.inference import grpc_service_pb2 as kserve

TraceValues = dict[str, tuple[str, ...]]
LogValue = bool | int | str

_TRACE_DEFAULTS: TraceValues = {
    "trace_file": ("",),
    "trace_level": ("OFF",),
    "trace_rate": ("1000",),
    "trace_count": ("-1",),
    "log_frequency": ("0",),
    "trace_mode": ("triton",),
}
_TRACE_LEVELS = ("OFF", "TIMESTAMPS", "TENSORS")
_UINT32_MAX = (1 << 32) - 1

_LOG_DEFAULTS: dict[str, LogValue] = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
_LOG_FORMATS = ("default", "ISO8601")


class TraceSettings:
    """The global values, and each model's own where it has any."""

    def __init__(self) -> None:
        self._global: TraceValues = {}
        self._of_model: dict[str, TraceValues] = {}

    def values(self, model: str) -> TraceValues:
        """What is in force for a model; for "" globally."""
        return _TRACE_DEFAULTS | self._global | self._of_model.get(model, {})

    def update(self, model: str, changes: Mapping[str, Sequence[str]]) -> None:
        """Changes a model's own values, or for "" the global ones; an empty value takes one away.

        Raises InvalidArgument or Unimplemented, and then nothing has changed.
        """
        checked = {key: _checked_trace(key, tuple(value)) for key, value in changes.items()}
        own = (self._of_model.get(model, {}) if model else self._global) | checked
        own = {key: value for key, value in own.items() if value}
        if not model:
            self._global = own
        elif own:
            self._of_model[model] = own
        else:
            self._of_model.pop(model, None)

    def forget_all_but(self, models: Iterable[str]) -> None:
        """Drops the values of models that no longer exist: the state cannot outgrow the catalog."""
        known = set(models)
        self._of_model = {name: own for name, own in self._of_model.items() if name in known}


def _checked_trace(key: str, value: tuple[str, ...]) -> tuple[str, ...]:
    check = _TRACE_CHECKS.get(key)
    if check is None:
        raise InvalidArgument(
            f"unknown trace setting '{key}', expected one of {', '.join(_TRACE_DEFAULTS)}"
        )
    if value and key == "trace_file":
        raise Unimplemented("trace file location can not be updated through network protocol")
    if value and not check(value):
        raise InvalidArgument(f"invalid value {list(value)} for trace setting '{key}'")
    return value


def _is_levels(value: tuple[str, ...]) -> bool:
    # No more of them than there are: the values are kept.
    return len(value) <= len(_TRACE_LEVELS) and all(level in _TRACE_LEVELS for level in value)


def _is_number_from(low: int) -> Callable[[tuple[str, ...]], bool]:
    def check(value: tuple[str, ...]) -> bool:
        digits = value[0].removeprefix("-")
        if len(value) != 1 or not (digits.isascii() and digits.isdigit()) or len(digits) > 10:
            return False
        return low <= int(value[0]) <= _UINT32_MAX

    return check


_TRACE_CHECKS: dict[str, Callable[[tuple[str, ...]], bool]] = {
    "trace_file": lambda value: False,
    "trace_level": _is_levels,
    "trace_rate": _is_number_from(1),
    "trace_count": _is_number_from(-1),
    "log_frequency": _is_number_from(0),
    "trace_mode": lambda value: value == ("triton",),
}


class LogSettings:
    """What the server logs."""

    def __init__(self) -> None:
        self._values: dict[str, LogValue] = dict(_LOG_DEFAULTS)

    def values(self) -> dict[str, LogValue]:
        return dict(self._values)

    def update(self, changes: Mapping[str, kserve.LogSettingsRequest.SettingValue]) -> None:
        """Raises InvalidArgument or Unimplemented, and then nothing has changed."""
        self._values |= checked_log(changes)

    def level(self) -> int:
        """The `logging` level that these values mean. No peer can switch errors off."""
        if self._values["log_verbose_level"]:
            return logging.DEBUG
        if self._values["log_info"]:
            return logging.INFO
        return logging.WARNING if self._values["log_warning"] else logging.ERROR


def checked_log(
    changes: Mapping[str, kserve.LogSettingsRequest.SettingValue],
) -> dict[str, LogValue]:
    """The new values. Raises InvalidArgument, or Unimplemented for what nobody can change here."""
    return {key: _checked_log(key, value) for key, value in changes.items()}


def _checked_log(key: str, setting: kserve.LogSettingsRequest.SettingValue) -> LogValue:
    default = _LOG_DEFAULTS.get(key)
    if default is None:
        raise InvalidArgument(
            f"unknown log setting '{key}', expected one of {', '.join(_LOG_DEFAULTS)}"
        )
    if key == "log_file":
        raise Unimplemented("log file location can not be updated through network protocol")
    expected = _LOG_FIELD[type(default)]
    if setting.WhichOneof("parameter_choice") != expected:
        raise InvalidArgument(f"invalid value type for log setting '{key}', expected {expected}.")
    value: LogValue = getattr(setting, expected)
    if key == "log_format" and value not in _LOG_FORMATS:
        raise InvalidArgument(
            f"invalid value '{value}' for log setting '{key}', expected one of "
            f"{', '.join(_LOG_FORMATS)}"
        )
    return value


_LOG_FIELD: dict[type, str] = {bool: "bool_param", int: "uint32_param", str: "string_param"}


def trace_response(values: TraceValues) -> kserve.TraceSettingResponse:
    return kserve.TraceSettingResponse(
        settings={
            key: kserve.TraceSettingResponse.SettingValue(value=value)
            for key, value in values.items()
        }
    )


def log_response(values: Mapping[str, LogValue]) -> kserve.LogSettingsResponse:
    return kserve.LogSettingsResponse(
        settings={key: _log_value(value) for key, value in values.items()}
    )


def _log_value(value: LogValue) -> kserve.LogSettingsResponse.SettingValue:
    message = kserve.LogSettingsResponse.SettingValue()
    setattr(message, _LOG_FIELD[type(value)], value)
    return message
