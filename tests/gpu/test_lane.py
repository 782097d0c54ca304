# SPDX-License-Identifier: Apache-2.0
"""Device memory between a client's process and the worker's, on a GPU: arenas, events, deaths.

Not yet run on a GPU; THIRDRAIL_TEST_TWIN=1 runs it on a twin.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import thirdrail
from cuda_lane.test_device import (
    client,
    device,
    test_arrays_belong_to_one_session,
    test_arrays_stay_readable_after_the_session,
    test_errors_of_requests,
    test_host_and_device_in_one_request,
)
from server.test_lives import until
from support.server import RunningServer
from thirdrail.v1 import metrics_pb2, metrics_pb2_grpc

__all__ = [
    "client",
    "device",
    "test_arrays_belong_to_one_session",
    "test_arrays_stay_readable_after_the_session",
    "test_errors_of_requests",
    "test_host_and_device_in_one_request",
]

# Copies and calls until it is killed.
BUSY = """
import sys
import numpy as np
import thirdrail
client = thirdrail.Client(sys.argv[1])
device = thirdrail.Device(client)
x = device.empty(500_000)
source = np.ones(500_000, np.float32)
print("copying", flush=True)
while True:
    x.copy_from(source)
    result = device.infer("twin_double", {"x": device.array(source[:100])})
"""


@pytest.fixture
def server(gpu_server: RunningServer) -> RunningServer:
    return gpu_server


def test_many_threads_get_their_own_results(device: thirdrail.Device) -> None:
    """The order of their copies, our work and their reading is by events alone."""

    def caller(number: int) -> None:
        for turn in range(20):
            x = np.full(1000 + turn, number * 100 + turn, np.float32)
            with device.infer("twin_double", {"x": device.array(x)}) as result:
                assert (result["y"].numpy() == 2 * x).all()

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(caller, number) for number in range(4)]:
            each.result()


def test_a_client_killed_in_the_middle_of_a_copy_harms_nobody(
    server: RunningServer, device: thirdrail.Device
) -> None:
    x = np.arange(1000, dtype=np.float32)
    for _ in range(3):
        before = sessions(server)
        busy = subprocess.Popen(
            [sys.executable, "-c", BUSY, f"unix:{server.socket}"], stdout=subprocess.PIPE
        )
        assert busy.stdout is not None
        assert busy.stdout.readline() == b"copying\n"
        for _ in range(20):
            result = device.infer("twin_double", {"x": device.array(x)})
            assert result["y"].numpy().tolist() == (2 * x).tolist()
        busy.kill()
        busy.wait()
        busy.stdout.close()
        until(lambda before=before: sessions(server) <= before)
        result = device.infer("twin_double", {"x": device.array(x)})
        assert result["y"].numpy().tolist() == (2 * x).tolist()


def sessions(server: RunningServer) -> int:
    with server.channel() as channel:
        figures = metrics_pb2_grpc.MetricsStub(channel).Snapshot(metrics_pb2.SnapshotRequest())
    return sum(worker.sessions for worker in figures.workers)
