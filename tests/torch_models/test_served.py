# SPDX-License-Identifier: Apache-2.0
"""PyTorch's programs through a whole server: on PyTorch itself, and compiled."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import thirdrail
from support.server import RunningServer
from thirdrail.tensors import Array

pytestmark = [pytest.mark.needs_torch, pytest.mark.slow, pytest.mark.timeout(300)]

StartServer = Callable[..., RunningServer]
READY_S_MAX = 240.0  # a build waits for cores that nobody else wants
X = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)


def write_special(folder: Path, *lines: str) -> None:
    """ONNX has no word for it."""
    import torch

    from support.torch_modules import Special, save_exported

    (folder / "1").mkdir(parents=True)
    save_exported(folder / "1/model.pt2", Special(), (torch.ones(2, 3),), ({0: "rows"},))
    (folder / "config.pbtxt").write_text("\n".join(lines))


def expected() -> Array:
    import torch

    found: Array = torch.special.bessel_j0(torch.from_numpy(X)).numpy()
    return found


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


def test_pytorch_itself_serves_a_program(start_server: StartServer, tmp_path: Path) -> None:
    write_special(tmp_path / "models/special", parameter("engine", "torch"))
    server = start_server(tmp_path / "models", "--cache-dir", str(tmp_path / "cache"), wait=False)
    with thirdrail.Client(server.url) as client:
        client.wait_ready(READY_S_MAX, model="special")
        found = client.describe("special")
        assert (found.status.engine, found.status.engine_reason) == ("torch", "")
        assert 'platform: "pytorch_exported"' in found.config_pbtxt
        np.testing.assert_allclose(client.infer("special", {"x": X})["output"], expected())


@pytest.mark.needs_gcc
def test_a_compiled_program_is_served_and_says_what_it_was_compared_with(
    start_server: StartServer, tmp_path: Path
) -> None:
    compiled = parameter("torch_compile", "aot_inductor")
    write_special(tmp_path / "models/special", parameter("engine", "torch"), compiled)
    server = start_server(tmp_path / "models", "--cache-dir", str(tmp_path / "cache"), wait=False)
    with thirdrail.Client(server.url) as client:
        client.wait_ready(READY_S_MAX, model="special")
        found = client.describe("special")
        assert found.status.engine == "torch aot_inductor"
        assert found.engine_report.proof_reference == "torch"
        np.testing.assert_allclose(
            client.infer("special", {"x": X})["output"], expected(), atol=1e-6
        )
        assert 'output="output",reference="torch"' in client.metrics()
    command = [sys.executable, "-m", "thirdrail", "--url", server.url, "describe", "special"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "against PyTorch on the CPU:" in done.stdout
