# SPDX-License-Identifier: Apache-2.0
"""What goes to another process by pickle, as pools of processes do it."""

import asyncio
import copy
import pickle

import numpy as np
import pytest

from support.server import RunningServer
from thirdrail import Client
from thirdrail.aio import AsyncClient
from thirdrail.errors import FailedPrecondition

LARGE = np.arange(1 << 16, dtype=np.float32)


@pytest.mark.parametrize("transport", ["lane", "grpc"])
@pytest.mark.parametrize("borrow", [False, True])
def test_a_result_takes_its_arrays_with_it(
    server: RunningServer, transport: str, borrow: bool
) -> None:
    with Client(server.url, transport=transport) as client:  # type: ignore[arg-type]
        result = client.infer("identity_fp32", LARGE, borrow=borrow, request_id="7")
        others = [pickle.loads(pickle.dumps(result)), copy.copy(result), copy.deepcopy(result)]
        result.release()
        for other in others:
            assert np.array_equal(other["y"], LARGE)
            assert not other["y"].flags.writeable
            assert (other.request_id, other.is_borrowed) == ("7", False)
        with pytest.raises(FailedPrecondition, match="released"):
            pickle.dumps(result)


@pytest.mark.parametrize("transport", ["lane", "grpc"])
def test_a_client_becomes_one_of_its_own(server: RunningServer, transport: str) -> None:
    with Client(server.url, transport=transport) as client:  # type: ignore[arg-type]
        client.infer("identity_fp32", LARGE)
        with pickle.loads(pickle.dumps(client)) as other, copy.copy(client) as third:
            for one in (other, third):
                assert np.array_equal(one.infer("identity_fp32", LARGE)["y"], LARGE)
                assert one.transport.name == client.transport.name
        assert np.array_equal(client.infer("identity_fp32", LARGE)["y"], LARGE)


def test_a_client_for_asyncio_does_too(server: RunningServer) -> None:
    async def body() -> None:
        async with AsyncClient(server.url, transport="lane") as client:
            await client.infer("identity_fp32", LARGE)
            async with pickle.loads(pickle.dumps(client)) as other:
                assert np.array_equal((await other.infer("identity_fp32", LARGE))["y"], LARGE)
            await client.infer("identity_fp32", LARGE)

    asyncio.run(body())


def test_a_shared_tensor_says_how_it_goes_elsewhere(server: RunningServer) -> None:
    with Client(server.url) as client:
        received = client.receive(client.export(LARGE).token)
        with pytest.raises(TypeError, match="send the token"):
            pickle.dumps(received)
        assert np.array_equal(pickle.loads(pickle.dumps(received.array)), LARGE)
