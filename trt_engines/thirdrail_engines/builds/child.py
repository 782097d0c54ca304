# SPDX-License-Identifier: Apache-2.0
"""The process that builds. It first takes from itself what a stranger's model shall not have.

Run as a file, `child.py PARENT_PID NICENESS`, and not as a module: importing our package loads
numpy, whose libraries start threads, and a user namespace is only given to a process of one. So
this file imports nothing but the standard library, until the work begins.

Linux alone; the numbers are those of linux/prctl.h and linux/sched.h. Not kept from a build: files
that its user may read, and sockets that have a place among them.
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_OOM_SCORE_MAX = 1000

_libc = ctypes.CDLL(None, use_errno=True)


def main(parent_pid: int, niceness: int) -> None:
    open_network = leave_network()
    die_with(parent_pid)
    confine()
    step_back(niceness)
    from thirdrail_engines.builds.work import work

    warnings = [f"the build could reach the network: {open_network}"] if open_network else []
    work(warnings)
    # Libraries that fall over while they are taken down have nothing left to spoil.
    os._exit(0)


def leave_network() -> str:
    """Move into a network of its own that has no interfaces. Returns why that could not be done."""
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(_CLONE_NEWNET) == 0:  # root may at once
        return ""
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        reason = errno.errorcode.get(ctypes.get_errno(), "an unknown error")
        return f"the system allows no network namespace ({reason})"
    # Otherwise it would be nobody in its own eyes; files know better either way.
    with contextlib.suppress(OSError):
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    return ""


def die_with(parent_pid: int) -> None:
    """Be killed as soon as the parent's thread that started this process ends, however it does.

    After `leave_network`: a change of credentials clears the wish.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the wish was made
        os._exit(1)


def confine() -> None:
    """No new privileges, no core files, orphans stay in sight, and the first to go when the host
    runs out of memory."""
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # inherited from the thread that started us
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_MAX))


def step_back(niceness: int) -> None:
    """Give way to others on the CPU; the kernel derives the priority of disk accesses from that.

    niceness: see BuildLimits.
    """
    policy = os.SCHED_IDLE if niceness == 19 else os.SCHED_BATCH
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy, os.sched_param(0))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, max(niceness, os.getpriority(os.PRIO_PROCESS, 0)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
