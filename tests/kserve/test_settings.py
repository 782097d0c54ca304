# SPDX-License-Identifier: Apache-2.0
"""Trace and log settings: what they start with, what may be set, what a refusal leaves as it is."""

import logging
from typing import Any

import pytest

from thirdrail.errors import InvalidArgument, Unimplemented
from thirdrail_server.front.kserve.settings import (
    LogSettings,
    TraceSettings,
    log_response,
    trace_response,
)
from thirdrail_server.inference import grpc_service_pb2 as kserve

TRACE_DEFAULTS = {
    "trace_file": ("",),
    "trace_level": ("OFF",),
    "trace_rate": ("1000",),
    "trace_count": ("-1",),
    "log_frequency": ("0",),
    "trace_mode": ("triton",),
}


def test_trace_settings_start_with_defaults() -> None:
    assert TraceSettings().values("") == TRACE_DEFAULTS
    assert TraceSettings().values("M") == TRACE_DEFAULTS


def test_a_model_follows_the_global_values_except_where_it_has_its_own() -> None:
    trace = TraceSettings()
    trace.update("", {"trace_rate": ["7"], "trace_level": ["TIMESTAMPS", "TENSORS"]})
    trace.update("M", {"trace_rate": ["9"]})
    assert trace.values("M")["trace_rate"] == ("9",)
    assert trace.values("M")["trace_level"] == ("TIMESTAMPS", "TENSORS")
    assert trace.values("")["trace_rate"] == ("7",)
    assert trace.values("other")["trace_rate"] == ("7",)


def test_an_empty_value_goes_back_to_global_and_then_to_the_default() -> None:
    trace = TraceSettings()
    trace.update("", {"trace_rate": ["7"]})
    trace.update("M", {"trace_rate": ["9"]})
    trace.update("M", {"trace_rate": []})
    assert trace.values("M")["trace_rate"] == ("7",)
    trace.update("", {"trace_rate": [], "trace_file": []})
    assert trace.values("M") == TRACE_DEFAULTS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trace_level", ["LOUD"]),
        ("trace_level", ["OFF", "LOUD"]),
        ("trace_rate", ["0"]),
        ("trace_rate", ["1", "2"]),
        ("trace_rate", ["٣"]),
        ("trace_level", ["OFF"] * 4),
        ("trace_count", ["-2"]),
        ("trace_count", ["9" * 5000]),
        ("log_frequency", ["-1"]),
        ("log_frequency", [""]),
        ("trace_mode", ["opentelemetry"]),
        ("speed", ["1"]),
        ("speed", []),
    ],
)
def test_a_bad_trace_setting_changes_nothing(key: str, value: list[str]) -> None:
    trace = TraceSettings()
    with pytest.raises(InvalidArgument, match=f"trace setting '{key}'"):
        trace.update("", {"trace_rate": ["7"], key: value})
    assert trace.values("") == TRACE_DEFAULTS


def test_the_trace_file_cannot_be_set() -> None:
    trace = TraceSettings()
    with pytest.raises(Unimplemented):
        trace.update("M", {"trace_file": ["/tmp/x"]})
    assert trace.values("M") == TRACE_DEFAULTS


def test_values_of_models_that_are_gone_are_dropped() -> None:
    trace = TraceSettings()
    trace.update("gone", {"trace_rate": ["9"]})
    trace.update("here", {"trace_rate": ["8"]})
    trace.forget_all_but(["here"])
    assert trace.values("gone")["trace_rate"] == ("1000",)
    assert trace.values("here")["trace_rate"] == ("8",)


def test_the_trace_response_lists_every_setting() -> None:
    message = trace_response(TraceSettings().values(""))
    assert {key: tuple(each.value) for key, each in message.settings.items()} == TRACE_DEFAULTS


LogChange = kserve.LogSettingsRequest.SettingValue

LOG_DEFAULTS: dict[str, Any] = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


def test_log_settings_start_with_defaults() -> None:
    log = LogSettings()
    assert log.values() == LOG_DEFAULTS
    assert log.level() == logging.INFO


def test_log_settings_change() -> None:
    log = LogSettings()
    log.update(
        {
            "log_info": LogChange(bool_param=False),
            "log_verbose_level": LogChange(uint32_param=2),
            "log_format": LogChange(string_param="ISO8601"),
        }
    )
    changed = {"log_info": False, "log_verbose_level": 2, "log_format": "ISO8601"}
    assert log.values() == LOG_DEFAULTS | changed


@pytest.mark.parametrize(
    ("off", "verbose", "level"),
    [
        ([], 1, logging.DEBUG),
        (["log_info"], 0, logging.WARNING),
        (["log_info", "log_warning"], 0, logging.ERROR),
        (["log_info", "log_warning", "log_error"], 0, logging.ERROR),
    ],
)
def test_the_settings_mean_a_level_and_errors_stay_on(
    off: list[str], verbose: int, level: int
) -> None:
    log = LogSettings()
    log.update({key: LogChange(bool_param=False) for key in off})
    log.update({"log_verbose_level": LogChange(uint32_param=verbose)})
    assert log.level() == level


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("log_file", LogChange(string_param="/tmp/x"), Unimplemented),
        ("log_speed", LogChange(bool_param=True), InvalidArgument),
        ("log_info", LogChange(uint32_param=1), InvalidArgument),
        ("log_info", LogChange(), InvalidArgument),
        ("log_verbose_level", LogChange(bool_param=True), InvalidArgument),
        ("log_format", LogChange(string_param="xml"), InvalidArgument),
    ],
)
def test_a_bad_log_setting_changes_nothing(
    key: str, value: kserve.LogSettingsRequest.SettingValue, error: type[Exception]
) -> None:
    log = LogSettings()
    with pytest.raises(error):
        log.update({"log_warning": LogChange(bool_param=False), key: value})
    assert log.values() == LOG_DEFAULTS


def test_the_log_response_gives_each_value_its_type() -> None:
    settings = log_response(LogSettings().values()).settings
    types = {key: each.WhichOneof("parameter_choice") for key, each in settings.items()}
    assert types == {
        "log_file": "string_param",
        "log_info": "bool_param",
        "log_warning": "bool_param",
        "log_error": "bool_param",
        "log_verbose_level": "uint32_param",
        "log_format": "string_param",
    }
