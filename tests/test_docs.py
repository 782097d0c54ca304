# SPDX-License-Identifier: Apache-2.0
"""Every code block in the README and the docs is run here, word by word, page by page.

A page's blocks run in order in a folder of their own: shell blocks in one bash, Python blocks as
programs. Blocks in `text` are output or files and are not run; an HTML comment right above a block
says why it is not run here.
"""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.models import BATCHED_CONFIG, add, write
from support.server import reserved_port

REPO = Path(__file__).resolve().parent.parent
README = REPO / "README.md"
PAGES = [README, *sorted((REPO / "docs").glob("*.md"))]
# 3 to 12 s each
SLOW = (
    *("client.md", "compile.md", "grpc.md", "lane.md", "operations.md"),
    *("placement.md", "plan-cache.md", "transport.md"),
)

# Blocks that build or test the project itself; the command of CI runs them.
RUN_BY_CI = {"make demo\n", "make setup\n. .venv/bin/activate\n", "make test\n"}

# Servers that a failing block leaves behind must not outlive the test.
PREAMBLE = "set -euo pipefail -m\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"
SERVE = "thirdrail serve models/ &\nthirdrail health --wait 30"

BLOCK = re.compile(
    r"^(?P<comment><!-- [^\n]* -->\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True, slots=True)
class Block:
    kind: str
    code: str
    comment: str


def blocks(page: Path) -> Iterator[Block]:
    for match in BLOCK.finditer(page.read_text()):
        yield Block(match["kind"], match["code"], match["comment"] or "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks(page):
        assert block.kind in ("sh", "python", "text", ""), block
        if not block.kind:
            assert "--gRPC-->" in block.code, "an untagged block other than the picture"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in SLOW else [], id=page.name)
        for page in PAGES
    ],
)
def test_the_page_works_word_by_word(page: Path, tmp_path: Path) -> None:
    runnable = [
        b
        for b in blocks(page)
        if b.kind in ("sh", "python") and b.code not in RUN_BY_CI and not b.comment
    ]
    if not runnable:
        pytest.fail(f"{page.name} has nothing to run; take it out of PAGES")
    with reserved_port() as grpc_port, reserved_port() as metrics_port:
        script = _script(page, runnable, tmp_path, {"8001": grpc_port, "9100": metrics_port})
        result = subprocess.run(
            ["bash", "-c", f"{PREAMBLE}\n{script}"],
            cwd=tmp_path,
            env=_environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=110,
        )
    assert result.returncode == 0, f"{script}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr


def _script(page: Path, runnable: list[Block], tmp_path: Path, ports: dict[str, int]) -> str:
    steps = [
        _step(number, block, tmp_path, ports) for number, block in enumerate(_joined(runnable))
    ]
    if page.name != "README.md":
        write(tmp_path / "models", "add", add(), BATCHED_CONFIG)
        makes_model = next(b for b in blocks(REPO / "README.md") if "onnx.save" in b.code)
        steps = [_step(-1, makes_model, tmp_path, ports), *steps]
    if page.name in ("client.md", "grpc.md", "lane.md", "transport.md"):
        serve = _step(-2, Block("sh", SERVE, ""), tmp_path, ports)
        steps = [steps[0], serve, *steps[1:], "kill %1"]
    return "\n".join([*steps, "wait"])


def _joined(page: list[Block]) -> Iterator[Block]:
    """Python blocks in a row are one program: a later one uses the names of an earlier one."""
    for kind, group in itertools.groupby(page, key=lambda block: block.kind):
        yield Block(kind, "\n".join(block.code for block in group), "")


def _step(number: int, block: Block, folder: Path, ports: dict[str, int]) -> str:
    """The block as shell, on free ports: another server may have the default one here."""
    code = block.code
    for default, port in ports.items():
        code = re.sub(rf"\b{default}\b", str(port), code)
    if block.kind == "sh":
        address = f"--address 127.0.0.1:{ports['8001']}"
        return code.replace("thirdrail serve models/", f"thirdrail serve models/ {address}")
    program = folder / f"block{number}.py"
    program.write_text(code)
    return f"{sys.executable} {program}"


def _environment(folder: Path) -> dict[str, str]:
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Said, not found: before ours is up, a client would find another server of this machine.
    url = f"unix:{runtime}/thirdrail/grpc.sock"
    return {
        "PATH": path,
        "HOME": str(folder),
        "XDG_RUNTIME_DIR": str(runtime),
        "THIRDRAIL_URL": url,
        "TERM": "dumb",
    }
