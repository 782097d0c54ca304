# SPDX-License-Identifier: Apache-2.0
"""Imports the modules named on the command line in that order, then calls the server with thirdrail
and with whichever foreign client was among them.

    python -m foreign.programs.side_by_side URL MODULE...
"""

import asyncio
import importlib
import sys

import numpy as np

ROW = np.ones((1, 4), np.float32)
EXPECTED = [[2.0, 2.0, 2.0, 2.0]]


def call_with_thirdrail(url: str) -> None:
    import thirdrail

    with thirdrail.Client(url) as client:
        assert client.infer("plus_one", {"a": ROW})["c"].tolist() == EXPECTED


def call_with_tritonclient(url: str) -> None:
    import tritonclient.grpc as triton

    given = triton.InferInput("a", [1, 4], "FP32")
    given.set_data_from_numpy(ROW)
    with triton.InferenceServerClient(url) as client:
        assert client.infer("plus_one", [given]).as_numpy("c").tolist() == EXPECTED


def call_with_kserve(url: str) -> None:
    asyncio.run(_call_with_kserve(url))


async def _call_with_kserve(url: str) -> None:
    # mypy takes the tests of the same name for it
    from kserve import (  # type: ignore[attr-defined]
        InferenceGRPCClient,
        InferInput,
        InferRequest,
    )

    given = InferInput("a", [1, 4], "FP32")
    given.set_data_from_numpy(ROW)
    async with InferenceGRPCClient(url) as client:
        response = await client.infer(InferRequest("plus_one", [given]))
        assert response.outputs[0].as_numpy().tolist() == EXPECTED


CALLS = {
    "thirdrail": call_with_thirdrail,
    "tritonclient.grpc": call_with_tritonclient,
    "kserve": call_with_kserve,
}

if __name__ == "__main__":
    url, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    for module in modules:
        if module in CALLS:
            CALLS[module](url)
    print("called with", *modules)
