# SPDX-License-Identifier: Apache-2.0
"""What a probe says of memory on devices."""

from pathlib import Path

import pytest

from thirdrail.device import cuda_runtime
from thirdrail.errors import FailedPrecondition
from thirdrail.v1 import sessions_pb2 as pb
from thirdrail_engines.cuda.sharing import How, Sharing
from thirdrail_server.config import ServerConfig
from thirdrail_server.front.sessions.probe import answer_probe

BEST = Sharing(How.VIRTUAL_MEMORY)
NONE = Sharing(How.HOST, ((How.VIRTUAL_MEMORY, "the device has no virtual memory management"),))


def answer(devices: dict[str, Sharing], why_no_lane: str = "", why_none: str = "") -> pb.Transport:
    found = answer_probe(
        pb.ProbeRequest(),
        ServerConfig(Path()),
        tcp_address=None,
        lane_address="",
        why_no_lane=why_no_lane,
        has_client_shm=False,
        devices=devices,
        why_no_device=why_none,
    )
    (cuda,) = [each for each in found.transports if each.name == "lane-cuda"]
    return cuda


def test_devices_that_share_are_told_and_those_that_do_not() -> None:
    told = answer({"GPU-1": BEST, "GPU-2": NONE})
    assert told.offered
    assert told.address == (
        "GPU-1: virtual memory, as file descriptors; GPU-2: host memory; not virtual memory, as "
        "file descriptors: the device has no virtual memory management"
    )
    assert answer({"GPU-2": NONE}).reason == told.address.partition("; ")[2]


def test_why_there_is_none() -> None:
    assert answer({}, why_none="no driver").reason == "no driver"
    assert answer({}, why_no_lane="no lane", why_none="no driver").reason == "no lane"
    assert "no worker of this server computes on a device" in answer({}).reason


def test_a_client_says_what_it_lacks() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        cuda_runtime.load_driver()
    # Whichever is missing here: the bindings, the driver, or a device.
    assert str(caught.value).startswith("memory on a device needs ")
    assert cuda_runtime.INSTALL == "pip install 'thirdrail[cuda]'"
