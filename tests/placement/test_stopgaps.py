# SPDX-License-Identifier: Apache-2.0
"""A memory budget for models that serve while a better engine is built: none is interrupted."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.compiled import status_of, until_engine, until_ready, write_compiled
from support.perceptrons import two_layers
from support.server import RunningServer
from thirdrail import Client
from thirdrail.errors import InvalidArgument

StartServer = Callable[..., RunningServer]

X = np.ones((1, 16), np.float32)
WIDTH = 1 << 15  # 4 MiB of weights, of which ONNX Runtime makes 6: it pads narrow matrices


def started(tmp_path: Path, start_server: StartServer, mib: float, *arguments: str) -> Client:
    repository = tmp_path / "repository"
    write_compiled(repository, "m", two_layers(width=WIDTH), serve_while_compiling="true")
    budget, cache = f"--memory-gib={mib / 1024}", f"--cache-dir={tmp_path / 'cache'}"
    control = ("--model-control=explicit", "--load-model=m")
    return Client(start_server(repository, *control, budget, cache, *arguments, wait=False).url)


@pytest.mark.slow
def test_a_better_engine_that_does_not_fit_beside_the_first_is_not_had(
    tmp_path: Path, start_server: StartServer
) -> None:
    with started(tmp_path, start_server, 9, "--swap=unload-first") as client:
        until_ready(client, "m")
        while not (warnings := client.describe("m").warnings):
            assert client.infer("m", X)["y"].shape == (1, 8)
            time.sleep(0.01)
        assert "the last reload failed, what was loaded before is serving" in warnings[0]
        assert "no room for 'm': it needs 4." in warnings[0]
        assert status_of(client, "m").engine == "onnxruntime"
        assert client.infer("m", X)["y"].shape == (1, 8)


@pytest.mark.slow
def test_a_better_engine_that_fits_takes_over(tmp_path: Path, start_server: StartServer) -> None:
    with started(tmp_path, start_server, 16) as client:
        until_engine(client, "m", "onnxruntime plan")
        (worker,) = client.snapshot().workers
        assert 4 << 20 <= worker.model_bytes < 8 << 20, "the first engine is gone"
        with pytest.raises(InvalidArgument):
            client.infer("m", X[:, :3])
