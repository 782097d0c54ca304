# SPDX-License-Identifier: Apache-2.0
"""A build's process that does what no builder should.

    misbehaving.py WHAT [UID] PARENT_PID NICENESS

It is the real process up to the point where the work begins, which is replaced. So it runs, like
the real one, as a file that imports nothing of ours before.
"""

import contextlib
import ctypes
import encodings.idna  # noqa: F401  a connection wants it, when nobody can read it any more
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

MIB = 1 << 20


def result(plan: str = "model.plan", **more: Any) -> bytes:
    fields = {
        "plan": plan,
        "layers": {"Conv": 1},
        "source_layers": {},
        "tensors": [["x", "FP32", [-1, 3], True]],
        "conversion": None,
        "warnings": [],
        **more,
    }
    return json.dumps({"result": fields}).encode() + b"\n"


def say(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def finish(**facts: Any) -> None:
    Path("model.plan").write_bytes(b"plan")
    say(result(conversion=facts))


def well() -> None:
    finish()


def segfault() -> None:
    os.write(2, b"about to read address 0\n")
    ctypes.string_at(0)


def abort() -> None:
    os.write(2, b"first line\nterminate called after throwing an instance of 'std::bad_cast'\n")
    os.abort()


def exit_code() -> None:
    os._exit(7)


def exit_after_result() -> None:
    finish()
    os._exit(7)


def killed() -> None:
    os.kill(os.getpid(), 9)


def nothing() -> None:
    pass


def hang() -> None:
    print("still at it", file=sys.stderr, flush=True)
    time.sleep(600)


def hang_deaf() -> None:
    """All that can be blocked or ignored is."""
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    for pipe in (0, 1, 2):
        os.close(pipe)
    time.sleep(600)


def hog() -> None:
    held: list[bytes] = []
    while len(held) < 64:  # 4 GiB: the test shall not take the host with it
        held.append(b"\1" * (64 * MIB))
    time.sleep(600)


def hog_in_children() -> None:
    """Each is below the limit, in a session of its own, and the child of nobody any more."""
    work = (
        "import os, time; open(f'hog{os.getpid()}', 'w'); "
        f"held = b'1' * {100 * MIB}; time.sleep(600)"
    )
    for _ in range(8):
        subprocess.run(["setsid", "sh", "-c", f'"{sys.executable}" -c "{work}" &'], check=True)
    time.sleep(600)


def flood() -> None:
    """Much on standard error; what is printed on standard output would be taken for answers."""
    for number in range(20_000):
        os.write(2, b"%06d " % number + b"x" * 1000 + b"\n")
    finish()


def progress_for_ever() -> None:
    while True:
        say(100 * (json.dumps({"progress": ["at work" + " " * 900 + ".", 1, 2]}).encode() + b"\n"))


def much_progress() -> None:
    """More than anything else that a build may say, as one that takes many hours does."""
    line = json.dumps({"progress": ["at work" + " " * 980 + ".", 1, 2]}).encode() + b"\n"
    for _ in range(17):
        say(1000 * line)
    finish()


def two_results() -> None:
    finish()
    say(result())


def garbage() -> None:
    say(os.urandom(5000) + b"\n")
    time.sleep(600)


def huge_line() -> None:
    say(b'{"progress": ["' + b"x" * (2 * MIB))
    time.sleep(600)


def deep() -> None:
    say(b"[" * 100_000 + b"\n")
    time.sleep(600)


def plan_elsewhere() -> None:
    say(result("../model.plan"))


def plan_is_a_link() -> None:
    os.symlink("/etc/hostname", "model.plan")
    say(result())


def plan_is_absent() -> None:
    say(result())


def escape_codes() -> None:
    refusal = ["refused", "no\x1b[2Jthing\nforged line"]
    say(json.dumps({"refusal": refusal}).encode() + b"\n")


def leaves_a_child() -> None:
    """That holds the pipes, and prints all the time."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import os\nwhile True: os.write(2, b'x' * 65536)"]
    )
    time.sleep(0.3)
    finish(child=child.pid)


def facts() -> None:
    port = int(Path("port").read_text())
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        network = "reached"
    except OSError as error:
        network = type(error).__name__
    status = Path("/proc/self/status").read_text()
    finish(
        network=network,
        environment=dict(os.environ),
        niceness=os.getpriority(os.PRIO_PROCESS, 0),
        policy=os.sched_getscheduler(0),
        session=os.getsid(0) == os.getpid(),
        folder=os.getcwd(),
        oom_score=int(Path("/proc/self/oom_score_adj").read_text()),
        threads=len(os.listdir("/proc/self/task")),
        no_new_privileges="NoNewPrivs:\t1" in status,
        descriptors=sorted(_open_files()),
        user=os.geteuid(),
    )


def _open_files() -> Iterator[str]:
    """All but the three that every process has, and libffi's own: for ctypes it keeps its library
    open where it was built so, as in newer systems."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # what listed them
            name = os.readlink(f"/proc/self/fd/{number}")
            if int(number) > 2 and "/libffi.so" not in name:
                yield name


def replaced(work: Callable[[], None]) -> ModuleType:
    module = ModuleType("thirdrail_engines.builds.work")

    def instead(warnings: list[str]) -> None:
        if work is facts:
            Path("warnings").write_text(json.dumps(warnings))
        sys.stdin.buffer.readline()
        work()

    module.work = instead  # type: ignore[attr-defined]
    return module


def real_child() -> Any:
    """The module child.py, from its file: its package would be imported with it otherwise."""
    for folder in sys.path:
        path = Path(folder) / "thirdrail_engines/builds/child.py"
        if path.exists():
            spec = importlib.util.spec_from_file_location("child", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise SystemExit("child.py is not on the path")


if __name__ == "__main__":
    what, *user, parent_pid, niceness = sys.argv[1:]
    # The real package is not imported either, so that its threads are not here.
    for name in ("thirdrail_engines", "thirdrail_engines.builds"):
        sys.modules[name] = ModuleType(name)
    sys.modules["thirdrail_engines.builds.work"] = replaced(globals()[what])
    child = real_child()
    for uid in map(int, user):
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        # What a program started by that user would be; PR_SET_DUMPABLE of linux/prctl.h.
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
    child.main(int(parent_pid), int(niceness))
