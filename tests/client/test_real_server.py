# SPDX-License-Identifier: Apache-2.0
"""Both clients against a real Thirdrail server: the same calls, the same answers."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest

from support.server import RunningServer
from thirdrail import Client, errors
from thirdrail.aio import AsyncClient
from thirdrail.dtypes import BYTES, DTYPES, DType

X = np.ones(1, np.float32)
# A second or so: an engine's run is not cut short by a cancel.
LONG = {"x": X, "turns": np.array(100_000)}


@pytest.fixture
def client(server: RunningServer) -> Any:
    with Client(server.url) as client:
        yield client


def example(dtype: DType) -> np.ndarray[Any, Any]:
    if dtype is BYTES:
        return np.array([b"", b"a\0b", "ä".encode() * 1000], dtype=np.object_)
    assert dtype.numpy is not None
    return np.array([0, 1, 1], dtype=dtype.numpy)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda row: row.name)
def test_every_type_there_and_back(client: Client, dtype: DType) -> None:
    sent, model = example(dtype), f"identity_{dtype.name.lower()}"
    for result in (
        client.infer(model, {"x": sent}),
        client.infer(model, sent.tolist()),
        client.infer(model, {"x": sent[::-1]}),
    ):
        assert result["y"].dtype == sent.dtype
        assert sorted(result["y"].tolist()) == sorted(sent.tolist())
    assert client.infer(model, {"x": sent[:0]})["y"].shape == (0,)


def test_both_clients_get_the_same(server: RunningServer, client: Client) -> None:
    a, b = np.arange(8, dtype=np.float32).reshape(2, 4), np.ones((2, 4), np.float32)

    async def call() -> Any:
        async with AsyncClient(server.address) as other:
            async with other.stream() as stream:
                streamed = await stream.submit("add", {"a": a, "b": b})
            return await other.infer("add", {"a": a, "b": b}), streamed, await other.describe("add")

    mine = client.infer("add", {"a": a, "b": b})
    theirs, streamed, description = asyncio.run(call())
    for result in (mine, theirs, streamed):
        np.testing.assert_array_equal(result["c"], a + b, strict=True)
        assert result.model_version == 1
        assert result.timing.compute_ns > 0
    assert description == client.describe("add")


def test_requests_of_a_stream_are_batched(client: Client) -> None:
    rows = [np.full((1, 4), n, np.float32) for n in range(64)]
    with client.stream() as stream:
        futures = [stream.submit("add", {"a": row, "b": row}) for row in rows]
        results = [future.result() for future in futures]
    assert all((r["c"] == 2 * row).all() for r, row in zip(results, rows, strict=True))
    assert max(result.timing.batch_rows for result in results) > 1


@pytest.mark.parametrize(
    ("model", "inputs", "error"),
    [
        ("nowhere", {"x": np.ones(1)}, errors.NotFound),
        ("add", {"a": np.ones((1, 4), np.float32)}, errors.InvalidArgument),
        ("identity_fp32", {"x": np.ones(1)}, errors.InvalidArgument),
        ("gather", {"index": np.array([9])}, errors.InvalidArgument),
    ],
)
def test_failures_have_one_type_on_every_way(
    client: Client, model: str, inputs: Any, error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        client.infer(model, inputs)
    assert type(client.submit(model, inputs).exception()) is raised.type
    with client.stream() as stream:
        streamed = stream.submit(model, inputs).exception()
        assert type(streamed) is raised.type
        assert str(streamed) == str(raised.value)


@pytest.mark.slow
def test_a_full_queue(client: Client) -> None:
    with client.stream() as stream:
        futures = [stream.submit("narrow", LONG) for _ in range(8)]
    refused = [f.exception() for f in futures if f.exception() is not None]
    assert refused
    assert {type(error) for error in refused} == {errors.QueueFull}


def test_a_timeout_that_passes_in_the_queue(client: Client) -> None:
    running = client.submit("slow", LONG)
    wait_for(lambda: figures(client, "slow").running == 1)
    with client.stream() as stream:
        streamed = stream.submit("slow", LONG, timeout=0.05)
        with pytest.raises(errors.TimedOut):
            client.infer("slow", LONG, timeout=0.05)
        assert isinstance(streamed.exception(), errors.TimedOut)
    running.result()


def test_cancelled_requests_leave_the_queue(client: Client) -> None:
    running = client.submit("slow", LONG)
    wait_for(lambda: figures(client, "slow").running == 1)
    waiting = client.submit("slow", LONG)
    wait_for(lambda: figures(client, "slow").queued == 1)
    assert waiting.cancel()
    wait_for(lambda: figures(client, "slow").queued == 0)
    assert running.result()["y"].tolist() == [1.0]  # its neighbour did not notice
    with pytest.raises(CancelledError):
        waiting.result()


def figures(client: Client, model: str) -> Any:
    return next(m for m in client.snapshot().models if m.name == model)


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_health_models_metrics_watch(client: Client) -> None:
    client.wait_ready(30)
    assert client.health("add")
    with pytest.raises(errors.NotFound):
        client.health("nowhere")
    assert {status.name for status in client.models()} > {"add", "slow", "gather"}
    change = next(client.watch("add"))
    assert (change.status.name, change.status.state, change.initial) == ("add", "ready", True)
    assert "thirdrail" in client.metrics()


def test_control_is_off_by_default(client: Client) -> None:
    for call in (client.load, client.unload):
        with pytest.raises(errors.ThirdrailError, match="model-control"):
            call("add")
