# SPDX-License-Identifier: Apache-2.0
"""Imports point one way: thirdrail <- thirdrail_engines <- thirdrail_server."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "thirdrail": ROOT / "client/thirdrail",
    "thirdrail_engines": ROOT / "trt_engines/thirdrail_engines",
    "thirdrail_server": ROOT / "server/thirdrail_server",
}
# What each package may import of ours. The engines know tensors, and nothing of calls or clients.
ALLOWED = {
    "thirdrail": ("thirdrail",),
    "thirdrail_engines": (
        "thirdrail_engines",
        "thirdrail.tensors",
        "thirdrail.dtypes",
        "thirdrail.errors",
        "thirdrail.pages",
        "thirdrail.device",  # what both ends of shared device memory agree on
        "thirdrail._version",
    ),
    "thirdrail_server": ("thirdrail", "thirdrail_engines", "thirdrail_server"),
}


def imported(source: str) -> set[str]:
    """What a source imports, also inside functions; `a.b` for `from a import b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def forbidden(package: str, names: set[str]) -> set[str]:
    ours = {name for name in names if name.partition(".")[0] in FOLDERS}
    allowed = ALLOWED[package]
    return {n for n in ours if not any(n == a or n.startswith(f"{a}.") for a in allowed)}


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_point_one_way(package: str) -> None:
    files = sorted(FOLDERS[package].rglob("*.py"))
    assert files
    for file in files:
        assert not forbidden(package, imported(file.read_text())), file.relative_to(ROOT)


def test_the_rule_sees_every_form_of_import() -> None:
    assert forbidden("thirdrail", {"thirdrail_server.cli"})
    assert forbidden("thirdrail_engines", imported("def f():\n    from thirdrail import client"))
    assert forbidden("thirdrail_engines", imported("import thirdrail"))
    assert not forbidden("thirdrail_engines", imported("from thirdrail import tensors"))
    assert not forbidden("thirdrail_engines", imported("from thirdrail.errors import Internal"))


# What an idle worker does without, and what of memory that saves.
LATE = {
    "ml_dtypes": "3 MB",
    "numpy.random": "3 MB",
    "onnxruntime": "17 MB",
    "onnx": "20 MB",
    "google.protobuf.descriptor_pb2": "0.3 MB",
    "thirdrail_engines.cuda.engine": "1 MB",
    "thirdrail_engines.compiling": "2 MB, with the plan cache and builds",
    "thirdrail_engines.plan_cache": "2 MB",
    "torch": "200 MB",
    "tensorrt_rtx": "100 MB",
    "cuda": "10 MB",
    "grpc": "10 MB",
    "rich": "10 MB",
}


def test_a_worker_imports_what_it_needs() -> None:
    code = "import sys, thirdrail_server.worker.process; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "thirdrail_server.worker.process" in loaded
    assert not loaded & LATE.keys()
