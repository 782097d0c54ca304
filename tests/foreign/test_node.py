# SPDX-License-Identifier: Apache-2.0
"""A Node program with generated stubs, over TCP and the Unix socket. Its source, in `node/`, is
written to be read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.environments import REPOSITORY_ROOT, node_environment, run
from support.server import RunningServer

pytestmark = [pytest.mark.needs_node, pytest.mark.timeout(600)]

NODE = Path(__file__).parent / "node"
PROTOS = REPOSITORY_ROOT / "protos"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stubs generated anew, and the program bundled with them into one file."""
    tools, folder = node_environment("node", NODE), tmp_path_factory.mktemp("node")
    commands = tools / "node_modules" / ".bin"
    built = folder / "call_models.cjs"
    shutil.copy(NODE / "call_models.ts", folder)
    what = [str(PROTOS), "--path", str(PROTOS / "thirdrail")]
    where = ["--template", str(NODE / "buf.gen.yaml"), "--output", str(folder)]
    done = run([str(commands / "buf"), "generate", *what, *where], cwd=tools)
    assert done.returncode == 0, done.stderr
    how = ["--bundle", "--platform=node", f"--outfile={built}", "--log-level=warning"]
    done = run(
        [str(commands / "esbuild"), str(folder / "call_models.ts"), *how],
        {"NODE_PATH": str(tools / "node_modules")},
    )
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture(params=["tcp", "unix"])
def answers(request: pytest.FixtureRequest, program: Path, server: RunningServer) -> Any:
    """What the program printed."""
    address = server.address if request.param == "tcp" else server.url
    done = run(["node", str(program), address])
    assert done.returncode == 0, f"{done.stderr}\n{server.log_text()}"
    assert "Traceback" not in server.log_text()
    return json.loads(done.stdout)


def test_calls_streams_and_refusals(answers: dict[str, Any]) -> None:
    assert {"plus_one", "slow"} <= set(answers["models"])
    assert answers["outputs"] == [2, 3, 4, 5]
    assert (answers["requestId"], answers["version"]) == ("from node", 1)
    assert answers["large"] is True
    assert answers["unknown"] == {
        "code": "NOT_FOUND",
        "details": "Request for unknown model: 'unheard_of' is not found",
    }
    assert answers["late"]["code"] == "DEADLINE_EXCEEDED"
    quick = {str(call): call + 1 for call in range(8)}
    failed = {"500": "REASON_NOT_FOUND", "1000": "REASON_CANCELLED"}
    assert answers["stream"] == quick | failed
