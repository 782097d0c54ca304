# SPDX-License-Identifier: Apache-2.0
"""KServe's Python client, which knows the Open Inference Protocol and none of its extensions."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np

from foreign.programs.checks import main, raised

# mypy takes the tests of the same name for it
from kserve import InferenceGRPCClient, InferInput, InferRequest  # type: ignore[attr-defined]

Call = Callable[[InferenceGRPCClient], Awaitable[None]]


def _with_client(url: str, call: Call) -> None:
    async def run() -> None:
        async with InferenceGRPCClient(url) as client:
            await call(client)

    asyncio.run(run())


def _request(model: str, name: str, datatype: str, array: Any, *, raw: bool = True) -> InferRequest:
    tensor = InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=raw)
    return InferRequest(model, [tensor], request_id="order 7")


def check_health(url: str) -> None:
    async def call(client: InferenceGRPCClient) -> None:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("plus_one")
        assert not await client.is_model_ready("unheard_of")

    _with_client(url, call)


def _infer_plus_one(url: str, *, raw: bool) -> None:
    async def call(client: InferenceGRPCClient) -> None:
        array = np.arange(8, dtype=np.float32).reshape(2, 4)
        response = await client.infer(_request("plus_one", "a", "FP32", array, raw=raw))
        assert (response.id, response.model_name) == ("order 7", "plus_one")
        output = response.get_output_by_name("c")
        assert output.datatype == "FP32"
        assert np.array_equal(output.as_numpy(), array + 1)

    _with_client(url, call)


def check_infer_with_raw_contents(url: str) -> None:
    _infer_plus_one(url, raw=True)


def check_infer_with_typed_contents(url: str) -> None:
    _infer_plus_one(url, raw=False)


def check_text(url: str) -> None:
    async def call(client: InferenceGRPCClient) -> None:
        words = np.array([b"a", b"", "Straße".encode()], np.object_)
        response = await client.infer(_request("identity_bytes", "x", "BYTES", words))
        assert list(response.get_output_by_name("y").as_numpy()) == list(words)

    _with_client(url, call)


def check_half_floats(url: str) -> None:
    async def call(client: InferenceGRPCClient) -> None:
        array = np.array([1.5, -2, np.inf], np.float16)
        response = await client.infer(_request("identity_fp16", "x", "FP16", array))
        assert response.get_output_by_name("y").as_numpy().tolist() == array.tolist()

    _with_client(url, call)


def check_unknown_model(url: str) -> None:
    async def call(client: InferenceGRPCClient) -> None:
        await client.infer(_request("unheard_of", "a", "FP32", np.ones(1, np.float32)))

    error = raised(grpc.aio.AioRpcError, lambda: _with_client(url, call))
    assert error.code() == grpc.StatusCode.NOT_FOUND, error
    assert "'unheard_of' is not found" in str(error.details()), error


if __name__ == "__main__":
    main(globals())
