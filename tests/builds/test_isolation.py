# SPDX-License-Identifier: Apache-2.0
"""What a build cannot see, reach or outlive."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.killable import until
from thirdrail_engines.builds import BuildLimits, BuiltPlan, memory_group, run_build
from thirdrail_engines.builds.environment import build_environment
from thirdrail_engines.plans import PlanRequest

Misbehave = Callable[..., BuiltPlan]
MISBEHAVING = Path(__file__).with_name("misbehaving.py")
NOBODY = 54321
GONE_S_MAX = 30  # it would hang for 600


@pytest.fixture(params=["as we are", "as nobody"])
def facts(
    request: pytest.FixtureRequest,
    request_for: PlanRequest,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Mapping[str, Any]:
    """What a build's process finds out about itself."""
    command = [sys.executable, "-P", str(MISBEHAVING), "facts"]
    if request.param == "as nobody":
        if os.geteuid() != 0:
            return {}  # then we have been nobody special before
        command.append(str(NOBODY))
        os.chown(folder, NOBODY, NOBODY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/cuda")
    with socket.create_server(("127.0.0.1", 0)) as server:
        (folder / "port").write_text(str(server.getsockname()[1]))
        built = run_build(
            request_for,
            folder,
            BuildLimits(seconds_max=60),
            lambda *_: None,
            threading.Event(),
            command=command,
        )
    assert built.conversion is not None
    warnings = json.loads((folder / "warnings").read_text())
    return {**built.conversion, "warnings": warnings, "was": request.param}


def test_a_build_is_alone_and_stands_back(facts: Mapping[str, Any], folder: Path) -> None:
    if not facts:
        return
    # Nothing listens in its network, and nothing leads out of it.
    if not facts["warnings"]:
        assert facts["network"] in ("ConnectionRefusedError", "OSError")
    else:  # a system that permits no namespace: said, and true
        assert "the build could reach the network" in facts["warnings"][0]
        assert facts["network"] == "reached"
    assert facts["niceness"] == 19
    assert facts["policy"] == os.SCHED_IDLE
    assert facts["session"]
    assert facts["oom_score"] == 1000
    assert facts["no_new_privileges"]
    assert facts["threads"] == 1
    assert facts["descriptors"] == []
    assert facts["user"] == (NOBODY if facts["was"] == "as nobody" else os.geteuid())
    assert facts["folder"] == str(folder)
    environment = facts["environment"]
    assert "secret" not in json.dumps(environment)
    assert environment["LD_LIBRARY_PATH"] == "/opt/cuda"
    assert environment["HOME"] == environment["TMPDIR"] == str(folder / "home")


@pytest.mark.slow  # not in `make test`, which has to pass in any container
def test_this_machine_permits_it(facts: Mapping[str, Any]) -> None:
    """So that the test above has shown something. Ubuntu forbids it to those who are not root."""
    if facts and os.geteuid() == 0:
        assert facts["warnings"] == []


def test_a_lower_niceness_keeps_a_share(request_for: PlanRequest, folder: Path) -> None:
    (folder / "port").write_text("1")
    built = run_build(
        request_for,
        folder,
        BuildLimits(niceness=5),
        lambda *_: None,
        threading.Event(),
        command=[sys.executable, "-P", str(MISBEHAVING), "facts"],
    )
    assert built.conversion is not None
    assert built.conversion["niceness"] == 5
    assert built.conversion["policy"] == os.SCHED_BATCH


def test_the_environment_is_what_is_named() -> None:
    ours = {"PATH": "/bin", "TOKEN": "x", "CUDA_VISIBLE_DEVICES": "GPU-1", "HOME": "/root"}
    environment = build_environment(ours, ["", "tests", "/a", "/b"], Path("/private"))
    assert environment["PYTHONPATH"] == "/a:/b"
    assert environment["HOME"] == "/private"
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert "TOKEN" not in environment
    assert set(environment) == {
        "PATH",
        "CUDA_VISIBLE_DEVICES",
        "HOME",
        "TMPDIR",
        "PYTHONPATH",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONUNBUFFERED",
        "ORT_DISABLE_TELEMETRY",
    }


PARENT = """
import sys, threading
from pathlib import Path
from thirdrail_engines.builds import BuildLimits, run_build
from thirdrail_engines.plans import Builder, PlanRequest
source, folder, *command = sys.argv[1:]
run_build(
    PlanRequest(Path(source), Builder.ONNXRUNTIME, ""), Path(folder), BuildLimits(),
    lambda *_: None, threading.Event(), command=command,
)
"""


def test_a_build_dies_with_its_parent(source: Path, folder: Path) -> None:
    command = [sys.executable, "-P", str(MISBEHAVING), "hang"]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(source), str(folder), *command])
    try:
        child = wait_for_child(parent.pid)
        time.sleep(0.1)  # most of the time it is at work by now; else it finds its parent gone
        parent.kill()
        parent.wait()
        gone, _ = psutil.wait_procs([child], timeout=GONE_S_MAX)
        assert gone
    finally:
        parent.kill()
        parent.wait()


def test_ctrl_c_is_for_who_waits_and_not_for_the_build(source: Path, folder: Path) -> None:
    """A terminal sends it to a whole process group. The build is ended by its parent, in order."""
    command = [sys.executable, "-P", str(MISBEHAVING), "hang"]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(source), str(folder), *command],
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    try:
        child = wait_for_child(parent.pid)
        until(lambda: os.getpgid(child.pid) != os.getpgid(parent.pid))  # it has just been forked
        os.killpg(parent.pid, signal.SIGINT)
        _, stderr = parent.communicate()
        assert b"KeyboardInterrupt" in stderr
        assert psutil.wait_procs([child], timeout=GONE_S_MAX)[0]
    finally:
        parent.kill()
        parent.wait()


def wait_for_child(pid: int) -> psutil.Process:
    deadline_s = time.monotonic() + 20
    while True:
        children = psutil.Process(pid).children()
        if children:
            return children[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_group_goes_with_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which have just been killed, and still end."""
    with group_of_the_kernel() as folder, subprocess.Popen(["sleep", "600"]) as child:
        (folder / "cgroup.procs").write_text(str(child.pid))
        monkeypatch.setattr(memory_group, "_made", lambda *_: folder)
        with memory_group.of(child.pid, 1):
            assert child.poll() is None
        assert not folder.exists()
        assert child.wait() == -signal.SIGKILL


@contextlib.contextmanager
def group_of_the_kernel() -> Iterator[Path]:
    """A new one, of no controller, where we may make one."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    roots = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    folder = next(iter(roots), Path("/sys/fs/cgroup")) / f"thirdrail-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "cgroup.kill").open("r+").close()
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no group can be made: {error}")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            (folder / "cgroup.kill").write_text("1")
            until(lambda: not (folder / "cgroup.procs").read_text())
            folder.rmdir()
