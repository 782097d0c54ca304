# SPDX-License-Identifier: Apache-2.0
"""Our own client with the oldest packages that it promises to run with: every kind of call once."""

import asyncio

import numpy as np

import thirdrail
from foreign.programs.checks import main, raised
from thirdrail.aio import AsyncClient

REQUESTS = 20


def _row(value: int) -> dict[str, np.ndarray]:
    return {"a": np.full((1, 4), value, np.float32)}


def check_infer(url: str) -> None:
    with thirdrail.Client(url) as client:
        client.wait_ready()
        result = client.infer("plus_one", _row(1))
        assert result["c"].tolist() == [[2, 2, 2, 2]]
        words = np.array([b"a", b"\0"], np.object_)
        assert client.infer("identity_bytes", {"x": words})["y"].tolist() == [b"a", b"\0"]


def check_refusal(url: str) -> None:
    with thirdrail.Client(url) as client:
        error = raised(thirdrail.CallerError, lambda: client.infer("unheard_of", _row(1)))
        assert "'unheard_of' is not found" in str(error)


def check_stream(url: str) -> None:
    with thirdrail.Client(url) as client, client.stream() as stream:
        futures = [stream.submit("plus_one", _row(value)) for value in range(REQUESTS)]
        for value, future in enumerate(futures):
            assert future.result(30)["c"][0, 0] == value + 1


def check_models(url: str) -> None:
    with thirdrail.Client(url) as client:
        assert "plus_one" in {model.name for model in client.models(ready_only=True)}
        assert client.describe("add").batch_rows_max == 8
        assert client.health()
        assert "plus_one" in {model.name for model in client.snapshot().models}


def check_asyncio(url: str) -> None:
    asyncio.run(_asyncio_calls(url))


async def _asyncio_calls(url: str) -> None:
    async with AsyncClient(url) as client:
        results = await asyncio.gather(
            *(client.infer("plus_one", _row(value)) for value in range(REQUESTS))
        )
        assert [result["c"][0, 0] for result in results] == list(range(1, REQUESTS + 1))
        async with client.stream() as stream:
            tasks = [stream.submit("plus_one", _row(value)) for value in range(REQUESTS)]
            for value, task in enumerate(tasks):
                assert (await task)["c"][0, 0] == value + 1


if __name__ == "__main__":
    main(globals())
