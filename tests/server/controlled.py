# SPDX-License-Identifier: Apache-2.0
"""A running server whose models change: what it is asked, and models that load slowly."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from support.models import slow, write
from support.server import RunningServer
from thirdrail import Client

A = np.zeros((1, 4), np.float32)
EXPLICIT = ("--model-control=explicit", "--load-model=*")
POLL = ("--model-control=poll", "--poll-interval=0.2")


@contextlib.contextmanager
def client_of(server: RunningServer, *, tcp: bool = False) -> Iterator[Client]:
    with Client(server.address if tcp else server.url) as client:
        yield client


def value_of(client: Client, version: int = 0) -> int:
    """What the model `plus` adds."""
    return int(client.infer("plus", {"a": A}, version=version)["c"][0, 0])


def state_of(client: Client, name: str) -> str:
    return ", ".join(each.state for each in client.models() if each.name == name)


def reason_of(client: Client, name: str) -> str:
    return next(each.reason for each in client.models() if each.name == name)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def warmed_up(count: int) -> str:
    """A configuration whose warm-up runs the slow model's loop `count` times."""
    return (
        f'model_warmup {{ name: "long" count: {count}'
        ' inputs { key: "x" value { data_type: TYPE_FP32 dims: 1 zero_data: true } }'
        ' inputs { key: "turns" value { data_type: TYPE_INT64 input_data_file: "turns" } } }'
    )


def write_slow_to_load(repository: Path, name: str, turns: int) -> None:
    write(repository, name, slow(), warmed_up(1))
    (repository / name / "warmup").mkdir()
    (repository / name / "warmup" / "turns").write_bytes(np.array(turns).tobytes())
