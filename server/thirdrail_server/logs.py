# SPDX-License-Identifier: Apache-2.0
"""Logs: one line per event on standard error, as text for people or as JSON for programs."""

import json
import logging
import os
import sys
import time

LEVEL_VARIABLE = "THIRDRAIL_LOG_LEVEL"
FORMAT_VARIABLE = "THIRDRAIL_LOG_FORMAT"
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logging(*, process: str) -> None:
    """Set up the root logger from the environment, which workers inherit from the front.

    process: what the lines say they come from, e.g. "front" or "worker cpu".
    """
    handler = logging.StreamHandler(sys.stderr)
    is_json = os.environ.get(FORMAT_VARIABLE, "text") == "json"
    handler.setFormatter(_JsonFormatter(process) if is_json else _TextFormatter(process))
    handler.addFilter(_is_no_chatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(os.environ.get(LEVEL_VARIABLE, "INFO").upper())


def _is_no_chatter(record: logging.LogRecord) -> bool:
    """gRPC's Python code tells at debug, twenty times a second, that there is an event loop."""
    return record.levelno > logging.DEBUG or not record.name.startswith("grpc.")


def _extra(record: logging.LogRecord) -> dict[str, object]:
    """What the caller passed as `extra`: request ids, models, numbers."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD_FIELDS}


def printable(text: str) -> str:
    """With an escape for every character that is no letter, digit, sign or plain space: whoever
    names things writes no lines of his own, and reaches no terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {key}={value!r}" for key, value in _extra(record).items())
        line = (
            f"{clock}.{int(record.msecs):03d} {record.levelname.lower():7} {self._process}: "
            f"{printable(record.getMessage())}{fields}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)
