# SPDX-License-Identifier: Apache-2.0
"""`thirdrail cache` as typed: on folders, without a server."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.killable import killable
from support.plan_caches import content, hold_the_build, key, use_plan
from thirdrail.cli.app import app
from thirdrail_engines.plan_cache import Manifest, PlanCache
from thirdrail_server.cache_tables import age

MIB = 1 << 20
DAY_NS = 86400 * 10**9


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def typed(folder: Path) -> Callable[..., Outcome]:
    """typed("ls"): `thirdrail cache ls --cache-dir` with the folder of `filled`."""

    def run(*args: str, cache_dir: Path | None = folder) -> Outcome:
        where = ["--cache-dir", str(cache_dir)] if cache_dir else []
        result = CliRunner().invoke(app, ["cache", *args, *where], prog_name="thirdrail")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


Typed = Callable[..., Outcome]


@pytest.fixture
def filled(folder: Path) -> Path:
    """Plans a, b, c of 1 MiB; a was used 3 days ago, b 2, c 1."""
    with PlanCache(folder, 100 * MIB) as cache:
        for name in "abc":
            manifest = Manifest(
                source=f"/srv/models/{name}[x]/1/model.onnx",
                built_at="2026-11-21T06:00:00+00:00",
                build_s=12.5,
                layers={f"layer {number}": number for number in range(50)},
                tensors=[{"name": "x", "direction": "input", "type": "FP32", "shape": [-1, 3]}],
                warnings=["\x1b[31mred"],
            )
            parts = {"builder": "tensorrt_rtx", "builder_version": "1.7.1", "precision": "fp16"}
            parts["compute_capabilities"] = '["sm86","sm89"]'
            with cache.workspace() as work:
                (work / "plan").write_bytes(content(name, MIB))
                plan = cache.put(replace(key(name), parts=parts), work / "plan", manifest)
            cache.note(plan, "proof.json", b"{}")
    for days, name in ((3, "a"), (2, "b"), (1, "c")):
        for parent in ("plans", "notes"):
            path = folder / parent / key(name).digest
            used = path.stat().st_mtime_ns - days * DAY_NS
            os.utime(path, ns=(used, used))
    return folder


def damage(folder: Path, name: str) -> None:
    path = folder / "plans" / key(name).digest / "plan"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def names_in(folder: Path) -> str:
    there = os.listdir(folder / "plans")
    return "".join(name for name in "abc" if key(name).digest in there)


def test_a_clock_that_was_ahead_makes_no_negative_times(filled: Path, typed: Typed) -> None:
    later = filled.stat().st_mtime_ns + DAY_NS
    os.utime(filled / "plans" / key("a").digest, ns=(later, later))
    assert typed("ls", "--json").json[0]["used_s_ago"] == 0


def test_ls_is_a_table(filled: Path, typed: Typed) -> None:
    done = typed("ls")
    assert done.code == 0
    head, first, *_, last = done.out.splitlines()
    assert " ".join(head.split()) == "KEY MODEL BUILDER PRECISION FOR MIB BUILD S USED"
    assert first.split() == [
        key("c").digest[:12], "c[x]/1/model.onnx", "tensorrt_rtx", "1.7.1", "fp16", "sm86,sm89",
        "1.0", "12.5", "24", "h",
    ]  # fmt: skip
    assert last.split() == ["3", "plans,", "3.0", "MiB"]


def test_ls_tells_programs_more(filled: Path, typed: Typed) -> None:
    found = typed("ls", "--json").json
    assert [each["key"] for each in found] == [key(name).digest for name in "cba"]
    assert found[0]["plan_bytes"] == MIB
    assert found[0]["source"] == "/srv/models/c[x]/1/model.onnx"
    assert found[0]["key_parts"]["precision"] == "fp16"
    assert list(found[0]["notes"]) == ["proof.json"]
    assert not found[0]["in_use"]


def test_ls_does_not_count_notes_as_plans(filled: Path, typed: Typed) -> None:
    """Those about a plan that lies in a read-only cache."""
    shutil.rmtree(filled / "plans" / key("a").digest)
    lines = typed("ls").out.splitlines()
    [a] = [line for line in lines if line.startswith(key("a").digest[:12])]
    assert a.split()[1:5] == ["-"] * 4
    assert a.rstrip().endswith("notes only")
    assert lines[-1].startswith("2 plans")


def test_ls_tells_what_is_in_use_or_damaged(filled: Path, typed: Typed) -> None:
    (filled / "plans" / key("a").digest / "manifest.json").write_bytes(b"{")
    with killable(use_plan, filled, "b") as user:
        assert user.hear()
        lines = typed("ls").out.splitlines()
    [a] = [line for line in lines if line.startswith(key("a").digest[:12])]
    [b] = [line for line in lines if line.startswith(key("b").digest[:12])]
    assert a.rstrip().endswith("damaged")
    assert b.rstrip().endswith("in use")


def test_an_empty_cache_says_so(
    folder: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    done = typed("ls", cache_dir=None)
    assert (done.code, done.out) == (0, f"{folder}/thirdrail/plans holds no plans.\n")
    assert typed("ls", "--json", cache_dir=None).json == []
    assert not folder.exists(), "looking made it"


def test_the_default_is_the_users_cache(
    filled: Path, tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xdg/thirdrail").mkdir(parents=True)
    filled.rename(tmp_path / "xdg/thirdrail/plans")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert len(typed("ls", "--json", cache_dir=None).json) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/.cache/thirdrail/plans holds" in typed("ls", cache_dir=None).out


def test_show_tells_all(filled: Path, typed: Typed) -> None:
    done = typed("show", key("a").digest[:8])
    assert done.code == 0
    for text in (
        key("a").digest,
        "/srv/models/a[x]/1/model.onnx",
        "2026-11-21T06:00:00+00:00, in 12.5 s",
        "key: precision",
        "3 d ago",
        "[-1, 3]",
        "proof.json",
        '"layer 7": 7',
        "12 more lines with --json",
        "?[31mred",
    ):
        assert text in done.out, text
    assert "\x1b" not in done.out
    manifest = typed("show", key("a").digest, "--json").json["manifest"]
    assert manifest["layers"]["layer 49"] == 49


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["show", "ab"], "'ab' is too short a key, expected 4 letters"),
        (["show", "ffffff"], "no plan's key begins with 'ffffff'; thirdrail cache ls lists them"),
        (["prune", "ffffff"], "no plan's key begins with 'ffffff'"),
        (["verify", "ffffff"], "no plan's key begins with 'ffffff'"),
    ],
)
def test_keys_that_are_none(filled: Path, typed: Typed, command: list[str], text: str) -> None:
    done = typed(*command)
    assert done.code == 1
    assert done.err.startswith("Error: ")
    assert text in done.err


def test_a_key_of_two_plans_is_not_enough(filled: Path, typed: Typed) -> None:
    twin = filled / "plans" / (key("a").digest[:-1] + "0")
    twin.mkdir()
    assert (
        f"the keys of 2 plans begin with '{key('a').digest[:8]}'"
        in typed("show", key("a").digest[:8]).err
    )


@pytest.mark.parametrize("command", ["ls", "verify", "prune", "show abcd", "export /nowhere/x"])
def test_folders_that_are_no_cache(typed: Typed, tmp_path: Path, command: str) -> None:
    done = typed(*command.split(), cache_dir=tmp_path / "missing")
    assert done.code == 1
    assert f"there is no plan cache at {tmp_path}/missing" in done.err
    assert not (tmp_path / "missing").exists()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    done = typed(*command.split(), "--json", cache_dir=tmp_path / "open")
    assert done.code == 1
    assert "everybody can write to it" in json.loads(done.err)["error"]["message"]


def test_verify_finds_damage_and_leaves_it(filled: Path, typed: Typed) -> None:
    done = typed("verify")
    assert (done.code, done.out) == (0, "3 plans verified, 0 damaged\n")
    damage(filled, "b")
    done = typed("verify")
    assert done.code == 1
    name = key("b").digest[:12]
    assert done.out == (
        f"{name} is damaged: the plan's checksum is not the one in its manifest\n"
        "3 plans verified, 1 damaged\n"
    )
    assert typed("verify", key("a").digest[:6]).out == "1 plan verified, 0 damaged\n"
    faults = {each["key"]: each["fault"] for each in typed("verify", "--json").json}
    assert [bool(faults[key(each).digest]) for each in "abc"] == [False, True, False]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ([], "abc"),
        (["--all"], ""),
        (["--unused-days", "1.5"], "c"),
        (["--unused-days", "2.5"], "bc"),
        (["--to-gib", "0.0025"], "bc"),
        (["--to-gib", "0"], ""),
        (["--damaged"], "ac"),
        (["--damaged", "--to-gib", "0.0025"], "ac"),
        (["a"], "bc"),
        (["a", "b"], "c"),
        (["a", "--to-gib", "0.0025"], "bc"),
        (["c", "--unused-days", "2.5"], "b"),
    ],
)
def test_prune(filled: Path, typed: Typed, options: list[str], left: str) -> None:
    damage(filled, "b")
    command = [
        key(each).digest[:8] if len(each) == 1 and each.isalpha() else each for each in options
    ]
    said = typed("prune", *command, "--dry-run", "--json").json
    assert names_in(filled) == "abc"
    done = typed("prune", *command)
    assert done.code == 0
    assert names_in(filled) == left
    assert sorted(said["removed"]) == sorted(key(e).digest for e in "abc" if e not in left)
    assert len(os.listdir(filled / "notes")) == len(left)
    for name in "abc":
        assert (f"removed {key(name).digest[:12]}" in done.out) == (name not in left)
    assert os.listdir(filled / "work") == []


@pytest.mark.parametrize("amount", ["inf", "nan", "-1", "1e300"])
@pytest.mark.parametrize("option", ["--unused-days", "--to-gib"])
def test_prune_takes_no_amount_that_is_none(
    filled: Path, typed: Typed, option: str, amount: str
) -> None:
    done = typed("prune", option, amount)
    assert done.code == 2
    assert f"Invalid value for '{option}'" in done.err
    assert names_in(filled) == "abc"


def test_prune_spares_what_is_in_use(filled: Path, typed: Typed) -> None:
    with killable(use_plan, filled, "a") as user:
        assert user.hear()
        done = typed("prune", "--all")
    assert f"kept {key('a').digest[:12]}: in use" in done.out
    assert "2 plans, 2.0 MiB" in done.out
    assert names_in(filled) == "a"


def test_prune_sweeps_what_killed_builds_left(filled: Path, typed: Typed) -> None:
    with killable(hold_the_build, filled, "new") as builder:
        left: Path = builder.hear()
        typed("prune")
        assert left.exists()
        builder.kill()
    assert typed("prune").out == "0 plans, 0.0 MiB, and what 1 killed builds left\n"
    assert not left.exists()


def test_export_makes_a_cache_for_others(filled: Path, tmp_path: Path, typed: Typed) -> None:
    damage(filled, "b")
    done = typed("export", str(tmp_path / "farm"))
    assert done.code == 1
    assert f"{key('b').digest[:12]} is damaged and was left out" in done.err
    assert done.out == f"2 plans copied to {tmp_path}/farm, 0 there already\n"
    assert (tmp_path / "farm").stat().st_mode & 0o777 == 0o755
    again = typed("export", str(tmp_path / "farm"), key("c").digest[:8], "--json")
    assert again.json == {"copied": [], "there": [key("c").digest], "damaged": {}}
    with PlanCache(tmp_path / "own", 100 * MIB, [tmp_path / "farm"]) as cache:
        for name in "ac":
            plan = cache.get(key(name))
            assert plan is not None
            assert plan.data == content(name, MIB)
            assert plan.manifest.build_s == 12.5
            assert plan.manifest.key_parts["precision"] == "fp16"
        assert cache.get(key("b")) is None


def test_export_blames_the_destination_that_cannot_be_made(filled: Path, typed: Typed) -> None:
    refused = typed("export", "/proc/none")
    assert refused.code == 1
    assert "cannot export to /proc/none: /proc/none: no such file" in " ".join(refused.err.split())


def test_export_goes_into_no_folder_of_others(filled: Path, tmp_path: Path, typed: Typed) -> None:
    folder = tmp_path / "models"
    (folder / "double").mkdir(parents=True)
    refused = typed("export", str(folder))
    assert refused.code == 1
    assert f"{folder} holds other things and is no plan cache" in " ".join(refused.err.split())
    assert [each.name for each in folder.iterdir()] == ["double"]


def test_help_teaches(typed: Typed) -> None:
    done = typed("--help", cache_dir=None)
    assert "thirdrail cache prune --to-gib 5" in done.out
    for command in ("ls", "show", "verify", "prune", "export"):
        assert "Usage" in typed(command, "-h", cache_dir=None).out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_ages(seconds: int, text: str) -> None:
    assert age(seconds * 10**9) == text
