# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime reports nothing to its maker when it runs in our processes."""

import os
import subprocess
import sys
from pathlib import Path

LOAD_A_MODEL = """
import sys
from pathlib import Path
import onnx
from onnx import TensorProto, helper
import thirdrail_engines as engines

info = helper.make_tensor_value_info
graph = helper.make_graph(
    [helper.make_node("Neg", ["x"], ["y"])],
    "negate",
    [info("x", TensorProto.FLOAT, [1])],
    [info("y", TensorProto.FLOAT, [1])],
)
path = Path(sys.argv[1]) / "model.onnx"
opset = helper.make_opsetid("", 17)
onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[opset]), path)
engines.load(path, options=engines.EngineOptions(threads_max=1)).engine.close()
"""


def test_loading_a_model_leaves_no_trace_of_telemetry(tmp_path: Path) -> None:
    # Its uploader keeps a session file in the temporary folder, and below the home an identifier of
    # the device and the events that wait to be sent.
    home, temporary, work = tmp_path / "home", tmp_path / "temporary", tmp_path / "work"
    for folder in (home, temporary, work):
        folder.mkdir()
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_"))}
    # In continuous integration it stays silent of its own accord; that must not hide a failure.
    outside_ci = {k: v for k, v in inherited.items() if k not in ("CI", "GITHUB_ACTIONS")}
    subprocess.run(
        [sys.executable, "-c", LOAD_A_MODEL, str(work)],
        env={**outside_ci, "HOME": str(home), "TMPDIR": str(temporary)},
        check=True,
        timeout=60,
    )
    assert (work / "model.onnx").exists()
    assert list(temporary.iterdir()) == []
    assert list(home.rglob("*")) == []
