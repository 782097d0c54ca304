# SPDX-License-Identifier: Apache-2.0
"""Programs on a small disk, or on one that cannot be written to.

Where the system lets a user make namespaces of mounts, the disk is a tmpfs that only the program
sees and that ends with it. Elsewhere a full disk is imitated by a limit on the size of files.
"""

import functools
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
_TIMEOUT_S = 60


@functools.cache
def can_mount() -> bool:
    with_tmpfs = [*_NAMESPACE, "mount -t tmpfs none /tmp"]
    try:
        return not subprocess.run(with_tmpfs, capture_output=True, timeout=_TIMEOUT_S).returncode
    except FileNotFoundError:
        return False


def run_on_small_disk(disk: Path, size: int, code: str) -> str:
    """What the Python code prints, run with `disk` (a Path) on a disk of `size` bytes."""
    disk.mkdir(exist_ok=True)
    program = [sys.executable, "-c", _with_disk(disk, code)]
    if can_mount():
        mount = f'mount -t tmpfs -o size={size},mode=700 none "{disk}" && exec "$@"'
        return _run([*_NAMESPACE, mount, "sh", *program])
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    return _run(program, before=limit)


def run_read_only(disk: Path, source: Path, code: str) -> str:
    """The same on a disk with a copy of `source` that cannot be changed. Needs can_mount()."""
    disk.mkdir(exist_ok=True)
    steps = (
        f'mount -t tmpfs -o mode=700 none "{disk}"',
        f'cp -a "{source}/." "{disk}/"',
        f'mount -o remount,ro "{disk}"',
        'exec "$@"',
    )
    program = [sys.executable, "-c", _with_disk(disk, code)]
    return _run([*_NAMESPACE, " && ".join(steps), "sh", *program])


def _with_disk(disk: Path, code: str) -> str:
    paths = [str(Path(__file__).parent.parent)]
    return "\n".join(
        (
            f"import sys; sys.path[:0] = {paths!r}",
            f"from pathlib import Path; disk = Path({str(disk)!r})",
            textwrap.dedent(code),
        )
    )


def _run(command: list[str], before: object = None) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        preexec_fn=before,  # type: ignore[call-overload]
    )
    assert not done.returncode, done.stdout + done.stderr
    return str(done.stdout)
