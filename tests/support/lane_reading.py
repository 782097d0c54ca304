# SPDX-License-Identifier: Apache-2.0
"""What a scripted worker is asked and answers, and the threads that read its lane."""

import threading
import time
from typing import Any

import numpy as np

from thirdrail.lane.encoding import Encoder
from thirdrail.requests import Result

WAIT_S = 20
OPTIONS = Encoder().options("m", None, {})


def value(number: int) -> dict[str, Any]:
    return {"x": np.full(4, number, np.float32)}


def value_of(result: Result) -> int:
    return int(result["x"][0])


def watchers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "thirdrail-watcher"]


def until_no_watcher() -> None:
    deadline = time.monotonic() + WAIT_S
    while watchers():
        assert time.monotonic() < deadline
        time.sleep(0.005)
