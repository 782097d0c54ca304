# SPDX-License-Identifier: Apache-2.0
"""Device memory between an asyncio client's process and the worker's, on a GPU.

Not yet run on a GPU; THIRDRAIL_TEST_TWIN=1 runs it on a twin.
"""

import asyncio

import numpy as np
import pytest

from cuda_lane.test_aio_device import (
    device_of,
    test_a_device_is_asked_for_once,
    test_arrays_belong_to_one_session,
    test_arrays_stay_readable_after_the_session,
    test_coroutines_share_a_device,
    test_errors_of_requests,
    test_host_and_device_in_one_request,
    test_places_and_memory_come_back_with_the_last_view,
)
from support.server import RunningServer

__all__ = [
    "test_a_device_is_asked_for_once",
    "test_arrays_belong_to_one_session",
    "test_arrays_stay_readable_after_the_session",
    "test_coroutines_share_a_device",
    "test_errors_of_requests",
    "test_host_and_device_in_one_request",
    "test_places_and_memory_come_back_with_the_last_view",
]


@pytest.fixture
def server(gpu_server: RunningServer) -> RunningServer:
    return gpu_server


async def test_many_coroutines_get_their_own_results(server: RunningServer) -> None:
    """The order of their copies, our work and their reading is by events alone."""
    async with device_of(server) as (_, device):

        async def caller(number: int) -> None:
            for turn in range(20):
                x = np.full(1000 + turn, number * 100 + turn, np.float32)
                with await device.infer("twin_double", {"x": await device.array(x)}) as result:
                    values = await asyncio.to_thread(result["y"].numpy)
                assert (values == 2 * x).all()

        await asyncio.gather(*map(caller, range(4)))
