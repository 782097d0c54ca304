# SPDX-License-Identifier: Apache-2.0
"""Says in one line that the installed protobuf is too old, which by itself ends in a traceback.

It was new enough when we were installed; a package that came later may have brought an older one.
"""

import re

from google.protobuf import __version__ as installed

FLOOR = "5.29.0"  # what our own stubs were generated for

# What generated code raises a VersionError with, see google.protobuf.runtime_version.
_OLDER = re.compile(r"loading (\S+): gencode (\S+) runtime \S+\. Runtime version cannot be older")


class ProtobufTooOld(ImportError):
    """The text says who needs which protobuf, which one there is, and what to do."""


def require_floor() -> None:
    """Raises ProtobufTooOld where our own stubs cannot be loaded."""
    if _numbers(installed) < _numbers(FLOOR):
        raise _too_old("thirdrail", FLOOR)


def too_old(error: Exception) -> ProtobufTooOld | None:
    """What is wrong, if this is it: with our stubs, or those of another package."""
    if isinstance(error, ProtobufTooOld):
        return error
    older = _OLDER.search(str(error)) if type(error).__name__ == "VersionError" else None
    return _too_old(*older.groups()) if older else None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _too_old(who: str, needed: str) -> ProtobufTooOld:
    return ProtobufTooOld(
        f"{who} needs protobuf {needed} or newer, and {installed} is installed. Install it with: "
        f"pip install 'protobuf>={needed}' (`pip check` then names what wants an older one, which "
        "needs an environment of its own)"
    )
