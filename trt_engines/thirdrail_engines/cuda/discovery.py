# SPDX-License-Identifier: Apache-2.0
"""Which CUDA devices this host has, for a process that must not touch them.

The driver is asked in a child that ends at once, so that nothing of it stays in the asker: a
process that was forked after it had used the driver can use it no more. Without a driver there is
no child either. Not yet run on a GPU.
"""

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from thirdrail_engines.cuda.identity import DeviceFacts

DRIVER = "libcuda.so.1"
ANSWER_S_MAX = 60.0  # the driver of a machine with many GPUs may take long at the first time


def has_driver(driver: str = DRIVER) -> bool:
    """Whether its library is here. It is not used."""
    try:
        ctypes.CDLL(driver)
    except OSError:
        return False
    return True


def discover(driver: str = DRIVER) -> tuple[tuple[DeviceFacts, ...], str]:
    """The devices in the order of their places on the bus, as nvidia-smi numbers them, and why
    there are none. What CUDA_VISIBLE_DEVICES hides is not there.
    """
    if not has_driver(driver):
        return (), f"there is no CUDA device here, as there is no NVIDIA driver ({driver})"
    try:
        child = subprocess.run(
            (sys.executable, "-P", "-m", __name__),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **os.environ},
            timeout=ANSWER_S_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"the NVIDIA driver could not be asked for its devices: {error}"
    try:
        answer = json.loads(child.stdout)
        return tuple(map(_facts, answer["devices"])), str(answer["why_none"])
    except (ValueError, LookupError, TypeError):
        words = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return (), f"the NVIDIA driver could not be asked for its devices: {words[:500]}"


def _facts(fields: dict[str, Any]) -> DeviceFacts:
    major, minor = map(int, fields["compute_capability"])
    newest = tuple(map(int, fields["driver"]))
    return DeviceFacts(
        str(fields["uuid"]),
        str(fields["name"]),
        (major, minor),
        int(fields["memory_bytes"]),
        (newest[0], newest[1]),
    )


if __name__ == "__main__":
    from thirdrail_engines.host import cuda_devices, why_no_cuda_device

    found = [dataclasses.asdict(facts) for facts in cuda_devices()]
    print(json.dumps({"devices": found, "why_none": "" if found else why_no_cuda_device()}))
