# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-subclassing-any=False
"""What is said of `.pt2` files that PyTorch itself does not read."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thirdrail_engines.plans import BuildError, BuildFault

pytestmark = [pytest.mark.needs_torch]

SaveModel = Callable[..., Path]

# Of programs whose operators and classes nobody has here: written by another process.
WRITING = """
import dataclasses, sys, torch

@torch.library.custom_op("mine::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2

twice.register_fake(torch.empty_like)

@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor

torch.export.register_dataclass(Pair, serialized_type_name="Pair")

class Model(torch.nn.Module):
    def forward(self, x):
        return twice(x) if sys.argv[1] == "operator" else Pair(x + 1, x + 2)

torch.export.save(torch.export.export(Model(), (torch.ones(2),)), sys.argv[2])
"""


def reason(path: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Which is all that is said."""
    from thirdrail_engines.torch_sources.exported import load_exported

    with pytest.raises(BuildError) as caught:
        load_exported(path)
    assert caught.value.fault is BuildFault.REFUSED
    assert capfd.readouterr() == ("", "")
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("operator", "it uses the operator mine::twice, which is not part of PyTorch "),
        ("class", "it takes or returns the class Pair, which only its own code knows: use dict"),
    ],
)
def test_code_that_is_not_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str, expected: str
) -> None:
    path = tmp_path / "model.pt2"
    command = [sys.executable, "-W", "ignore", "-c", WRITING, what, str(path)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert f" cannot read it: {expected}" in reason(path, capfd)


@pytest.fixture
def program(save_exported: SaveModel) -> Path:
    import torch

    from support.torch_modules import Identity

    return save_exported(Identity(), (torch.ones(2),))


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    """The program in the archive, as JSON, is changed by `change`."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith("models/model.json"))
    found = json.loads(members[name])
    change(found)
    members[name] = json.dumps(found).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_program_of_another_version_says_which_wrote_it(
    program: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    def change(found: Any) -> None:
        found["torch_version"] = "9.1.0"
        found["schema_version"] = {"major": 99, "minor": 0}

    rewrite(program, change)
    assert reason(program, capfd) == (
        f"model.pt2: PyTorch {torch.__version__} cannot read it (written by PyTorch 9.1.0): the "
        f"format is not that of PyTorch {torch.__version__}: save it again with that version"
    )


def test_what_no_advice_is_known_for_is_said_as_pytorch_does(
    program: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rewrite(program, lambda found: found.pop("graph_module"))
    text = reason(program, capfd)
    assert text.startswith("model.pt2: PyTorch ")
    assert text.endswith("'graph_module'")
