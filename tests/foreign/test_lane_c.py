# SPDX-License-Identifier: Apache-2.0
"""The C program of `examples/lane_c` against a real server: as it is, and with GCC's sanitizers."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.environments import REPOSITORY_ROOT, run
from support.server import RunningServer

pytestmark = pytest.mark.needs_gcc

SOURCE = REPOSITORY_ROOT / "examples" / "lane_c"
IDENTITY = "identity_fp32"
FREED_S_MAX = 20


@dataclass(frozen=True, slots=True)
class Program:
    path: Path
    server: RunningServer

    def __call__(self, model: str, size: int, token: str = "") -> subprocess.CompletedProcess[str]:
        place = thirdrail(self.server, "sessions", "open")
        command = [str(self.path), place["socket"], token or place["token"], model, str(size)]
        return run(command, {"ASAN_OPTIONS": "detect_leaks=1"})


def thirdrail(server: RunningServer, *arguments: str) -> Any:
    done = run([sys.executable, "-m", "thirdrail", "--url", server.url, "--json", *arguments])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["infer", "sanitized"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lane_c") / "source"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("infer", "sanitized"))
    done = run(["make", "CC=gcc", request.param], cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / str(request.param)


@pytest.fixture
def infer(built: Path, server: RunningServer) -> Program:
    return Program(built, server)


def line(count: int, where: str) -> str:
    return f"{count} elements, {where}, last {count - 1}, sum {count * (count - 1) // 2}\n"


def test_a_large_tensor_comes_back_in_shared_memory(infer: Program) -> None:
    done = infer(IDENTITY, 1 << 20)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == line(1 << 18, "in shared memory")


def test_a_small_tensor_comes_back_in_the_packet(infer: Program) -> None:
    done = infer(IDENTITY, 64)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == line(16, "in the packet")


def test_the_servers_refusal_is_shown(infer: Program) -> None:
    done = infer("unheard_of", 64)
    text = "infer: Request for unknown model: 'unheard_of' is not found\n"
    assert (done.stderr, done.returncode) == (text, 1)


def test_the_workers_goodbye_is_shown(infer: Program) -> None:
    done = infer(IDENTITY, 64, token="00" * 16)
    assert done.stderr.startswith("infer: the hello's token is not one of a session that waits")
    assert done.returncode == 1


def test_more_memory_than_there_may_be_is_refused_in_words(infer: Program) -> None:
    done = infer(IDENTITY, 1 << 40)
    assert done.stderr.startswith(f"infer: {1 << 40} more bytes of input memory were asked for")
    assert done.returncode == 1


def test_nothing_is_left_of_its_sessions(infer: Program) -> None:
    infer(IDENTITY, 1 << 20)
    deadline_s = time.monotonic() + FREED_S_MAX
    while any(each["client_name"] == "lane_c" for each in thirdrail(infer.server, "sessions")):
        assert time.monotonic() < deadline_s, thirdrail(infer.server, "sessions")
        time.sleep(0.05)
