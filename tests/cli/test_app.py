# SPDX-License-Identifier: Apache-2.0
"""`thirdrail` itself: help, shared options, other packages' commands, and what is not installed."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from thirdrail import __version__
from thirdrail.cli import extensions
from thirdrail.cli.app import shared_options_first
from thirdrail_server.cli import NEEDED_MODULES

Thirdrail = Callable[..., Any]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_teaches(typed: Thirdrail) -> None:
    done = typed("--help")
    assert done.code == 0
    for text in ("thirdrail infer digits --input", "3  no server answered", "THIRDRAIL_URL"):
        assert text in done.out
    commands = "models describe infer load unload health metrics top probe sessions"
    for name in commands.split():
        assert "Usage" in typed(name, "-h").out


@pytest.mark.parametrize("name", ["top", "sessions", "probe", "serve", "compile"])
def test_help_fills_the_lines_of_a_narrow_terminal(
    typed: Thirdrail, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A line is short where a paragraph ends, and nowhere else; examples are not broken."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    text = typed(name, "--help").out.partition("╭")[0]
    lines = [line.strip() for line in text.splitlines()]
    for line, below in itertools.pairwise(lines):
        word = below.partition(" ")[0]
        assert not word or line.startswith("thirdrail ") or len(f"{line} {word}") > 77 or not line


def test_version(typed: Thirdrail) -> None:
    assert typed("--version").out == f"thirdrail {__version__}\n"


@pytest.mark.parametrize("flags", [(), ("-u",)])
def test_a_full_disk_is_one_line(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = [sys.executable, *flags, "-m", "thirdrail", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Error: cannot write the output: No space left on device\n"


def test_a_pipe_that_nobody_reads_ends_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        command = [sys.executable, "-m", "thirdrail", "--version"]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_servers_commands_are_listed_without_importing_it() -> None:
    done = python("""
import sys
sys.argv = ["thirdrail", "--help"]
from thirdrail.cli import main
try:
    main()
finally:
    loaded = {"thirdrail_server.cli", "thirdrail_server.config", "onnxruntime"} & set(sys.modules)
    print("LOADED", loaded)
""")
    assert "LOADED set()" in done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("│ serve")]
    assert "Serve the models of a repository" in line


def test_the_servers_commands_run(typed: Thirdrail) -> None:
    assert "--model-control" in typed("serve", "--help").out
    assert "[default: off]" in typed("serve", "--help").out, "not taken for markup"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["m", "--shm=true"], ["m", "--shm"]),
        (["--shm=false", "m"], ["m"]),
        (["--shm", "m", "--shm=false"], ["m"]),
        (["--shm=false", "--shm=true", "m"], ["--shm", "m"]),
        (["--shm=maybe", "--other=true", "m"], ["--shm=maybe", "--other=true", "m"]),
        (["--shm=true", "--", "--shm=true"], ["--shm", "--", "--shm=true"]),
    ],
)
def test_flags_with_values_mean_what_they_say(given: list[str], meant: list[str]) -> None:
    assert extensions.flags_without_values(given, {"--shm"}) == meant


def test_the_servers_flags_may_have_values(typed: Thirdrail) -> None:
    done = typed("serve", "/nowhere", "--allow-client-shm=true", "--no-tcp=false", "--log-level=x")
    assert "--log-level takes" in done.err
    done = typed("serve", "/nowhere", "--allow-client-shm=maybe")
    assert "does not take a value" in done.err


def test_a_summary_is_read_from_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "its_commands.py").write_text('''
raise SystemExit("imported")
def act() -> None:
    """Act at once.

    More."""
''')
    monkeypatch.syspath_prepend(tmp_path)
    assert extensions.summary("its_commands", "act") == "Act at once."
    assert extensions.summary("its_commands", "missing") == ""
    assert extensions.summary("no_such_package.cli", "act") == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocked", "argv", "line"),
    [
        ("typer", "models", "pip install 'thirdrail[cli]'"),
        ("rich", "models", "pip install 'thirdrail[cli]'"),
        ("onnxruntime", "compile /nowhere", "pip install 'thirdrail[server]'"),
        *(
            (module, "serve /nowhere", "pip install 'thirdrail[server]'")
            for module in NEEDED_MODULES
        ),
    ],
)
def test_a_missing_package_names_the_line_that_installs_it(
    blocked: str, argv: str, line: str
) -> None:
    done = python(f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = ["thirdrail", *{argv!r}.split()]
from thirdrail.cli import main
main()
""")
    assert done.returncode == 2, done.stderr
    assert f"The package {blocked} is missing. Install it with: {line}" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_during_imports_is_no_traceback() -> None:
    done = python("""
import sys

class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
sys.argv = ["thirdrail", "serve", "models"]
from thirdrail.cli import main
main()
""")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_every_package_of_the_extra_is_looked_for() -> None:
    modules_of: dict[str, set[str]] = {}
    for module, distributions in metadata.packages_distributions().items():
        for each in distributions:
            modules_of.setdefault(canonical(each), set()).add(module)
    needed = of_extra("server") - of_extra("cli")
    for distribution in needed:
        assert modules_of[distribution] & set(NEEDED_MODULES), distribution
    assert len(needed) == len(NEEDED_MODULES)


def of_extra(extra: str) -> set[str]:
    lines = metadata.requires("thirdrail") or []
    return {canonical(re.split("[>=;]", each)[0]) for each in lines if f"== '{extra}'" in each}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("models --json", "--json models"),
        ("models --url U --json", "--url U --json models"),
        ("models --url=U x", "--url=U models x"),
        ("--url A models --tls-ca F", "--url A --tls-ca F models"),
        ("infer m -i x=--json", "infer m -i x=--json"),
        ("infer m -- --json", "infer m -- --json"),
        ("serve --json --tls-key K", "serve --json --tls-key K"),
        ("--json", "--json"),
        ("", ""),
    ],
)
def test_shared_options_may_stand_behind(given: str, wanted: str) -> None:
    assert shared_options_first(given.split(), {"models", "infer"}) == wanted.split()
