# SPDX-License-Identifier: Apache-2.0
"""`import thirdrail` stays light: it lives in other people's programs."""

import subprocess
import sys

import pytest

HEAVY = {
    "cuda",
    "onnx",
    "onnxruntime",
    "rich",
    "tensorrt",
    "tensorrt_rtx",
    "thirdrail_engines",
    "thirdrail_server",
    "torch",
    "typer",
}


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import thirdrail", "import thirdrail.client", "import thirdrail.cli"]
)
def test_what_is_not_imported(statement: str) -> None:
    loaded = modules_after(statement)
    assert "thirdrail" in loaded
    assert loaded & HEAVY == set()


def test_exceptions_are_at_hand_before_a_client_is() -> None:
    modules_after("import thirdrail; thirdrail.errors.TimedOut")


def test_other_peoples_messages_are_not_registered() -> None:
    """Two registrations of one file in one process crash: these files belong to other packages."""
    code = """
import thirdrail.aio, thirdrail.cli, thirdrail.client
from google.protobuf import descriptor_pool
pool = descriptor_pool.Default()
for name in ("inference.ModelInferRequest", "grpc.health.v1.HealthCheckRequest"):
    try:
        pool.FindMessageTypeByName(name)
    except KeyError:
        continue
    raise SystemExit(f"{name} is registered")
assert pool.FindMessageTypeByName("thirdrail.v1.InferRequest")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bf16_is_imported_when_asked_for() -> None:
    code = """
import sys
import numpy as np
import thirdrail
from thirdrail import dtypes
assert "ml_dtypes" not in sys.modules
shape, dtype, size = dtypes.extent((2, 3), "bfloat16")
assert (dtype.name, size) == ("bfloat16", 12)
assert dtypes.dtype_of_array(np.empty(shape, dtype)) is dtypes.BY_NAME["BF16"]
assert dtypes.dtype_of_array(np.empty(shape, "bfloat16")) is dtypes.BY_NAME["BF16"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bf16_without_ml_dtypes() -> None:
    code = """
import sys
sys.modules["ml_dtypes"] = None
import numpy as np
from thirdrail import arrays, dtypes, tensors
from thirdrail.errors import InvalidArgument
bf16 = dtypes.BY_NAME["BF16"]
for refused in (
    lambda: tensors.array_of_bytes("x", bf16, [1], bytes(2)),
    lambda: arrays.array_of_value("x", [1], tensors.TensorSpec("x", bf16, (-1,))),
):
    try:
        refused()
    except InvalidArgument as error:
        assert "ml_dtypes" in str(error)
    else:
        raise SystemExit("not refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
