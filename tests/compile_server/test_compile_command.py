# SPDX-License-Identifier: Apache-2.0
"""`thirdrail compile`: plans made ahead of time, with no server and no GPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.compiled import parameters
from support.models import double, write
from support.perceptrons import two_layers
from thirdrail.cli.app import app
from thirdrail.errors import InvalidArgument
from thirdrail_engines.compile_options import EngineChoice
from thirdrail_engines.plans import Builder, Precision
from thirdrail_engines.profiles import write_shape_range
from thirdrail_server.compile_cli import NOT_BUILT, NOT_KEPT
from thirdrail_server.compile_jobs import NO_PROGRAM, NO_TARGET, Job, Wish, jobs_at, read_profiles
from thirdrail_server.config import GIB

BATCHES = "max_batch_size: 8\n"
PROFILE = parameters(profile__0__x="1,4,8")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    write(folder, "batched", two_layers(), BATCHES)
    write(folder, "given", double(), PROFILE)
    write(folder, "open", double())
    return folder


def thirdrail(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "thirdrail", "compile", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stdout, ended.stderr


def test_a_model_is_compiled_once_for_this_cpu(repository: Path, tmp_path: Path) -> None:
    cache = f"--cache-dir={tmp_path / 'cache'}"
    status, told, _ = thirdrail(str(repository / "batched"), cache, "--json")
    assert status == 0
    [first] = json.loads(told)
    assert (first["model"], first["version"], first["target"]) == ("batched", 1, "this CPU")
    assert (first["builder"], first["result"]) == ("onnxruntime", "built")
    assert (tmp_path / "cache" / "plans" / first["plan_key"] / "plan").stat().st_size == (
        first["plan_bytes"]
    )
    status, table, _ = thirdrail(str(repository / "batched/1/model.onnx"), cache)
    assert status == 0
    assert table.split()[:3] == ["MODEL", "VERSION", "TARGET"]
    assert "cached" in table
    assert first["plan_key"][:12] in table


@pytest.mark.needs_tensorrt
def test_plans_for_gpus_that_are_not_here(repository: Path, tmp_path: Path) -> None:
    cache = f"--cache-dir={tmp_path / 'cache'}"
    status, told, _ = thirdrail(str(repository), "--for", "sm86, 8.9,sm120", cache, "--json")
    assert status == 1, "the open model is refused"
    found: list[dict[str, Any]] = json.loads(told)
    ends = {(each["model"], each["target"]): each["result"] for each in found}
    assert ends == {
        (name, target): "failed" if name == "open" else "built"
        for name in ("batched", "given", "open")
        for target in ("sm86", "8.9", "sm120")
    }
    assert len({each["plan_key"] for each in found if each["plan_key"]}) == 6
    refusal = next(each["reason"] for each in found if each["model"] == "open")
    assert "axis 0 of input 'x' [-1]; set max_batch_size, or write into config.pbtxt" in refusal
    status, told, _ = thirdrail(str(repository / "given"), "--for", "sm89,sm1", cache, "--json")
    assert [each["result"] for each in json.loads(told)] == ["cached", "failed"]
    assert status == 1


def test_what_is_no_model_is_a_mistake_on_the_command_line(tmp_path: Path) -> None:
    status, _, error = thirdrail(str(tmp_path / "nothing"), f"--cache-dir={tmp_path / 'cache'}")
    assert status == 2
    assert "MODEL_OR_REPO" in error


@pytest.mark.slow
def test_a_plan_that_is_not_kept_has_failed(repository: Path, tmp_path: Path) -> None:
    """The first one makes room for the others."""
    folder = tmp_path / "cache"
    cache = f"--cache-dir={folder}"
    assert thirdrail(str(repository), cache)[0] == 0
    held = sum(each.stat().st_size for each in (folder / "plans").rglob("*") if each.is_file())
    shutil.rmtree(folder)
    size = f"--cache-gib={held * 3 / 4 / GIB}"
    status, told, _ = thirdrail(str(repository), cache, size, "--json")
    found = {each["model"]: each["result"] for each in json.loads(told)}
    assert (status, found) == (1, {"batched": "failed", "given": "built", "open": "cached"})
    assert NOT_KEPT in told


@pytest.mark.slow
def test_nothing_is_built_for_a_cache_that_can_only_be_read(repository: Path) -> None:
    """It would be thrown away."""
    status, told, _ = thirdrail(str(repository / "given"), "--cache-dir=/proc/thirdrail", "--json")
    [found] = json.loads(told)
    assert (status, found["result"], found["reason"]) == (1, "failed", NOT_BUILT)


def test_a_cache_that_is_refused_is_an_error_for_programs_too(
    repository: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    command = ["compile", str(repository), f"--cache-dir={tmp_path}", "--json"]
    ended = CliRunner().invoke(app, command, prog_name="thirdrail")
    assert ended.exit_code == 1
    assert "everybody can write to it" in json.loads(ended.output)["error"]["message"]


def test_what_has_no_effect_is_told(repository: Path) -> None:
    write(repository, "given", double(), PROFILE + parameters(workspace_mb="100"))
    [job] = jobs(repository / "given")
    assert job.warnings == (
        "parameters is ignored: 'workspace_mb' not known; docs/compile.md lists those that are",
    )


@pytest.mark.needs_tensorrt
def test_a_file_by_itself_is_given_its_shapes(repository: Path, tmp_path: Path) -> None:
    """And has the very plan that the same model has with them in its configuration."""
    path, cache = str(repository / "open/1/model.onnx"), f"--cache-dir={tmp_path / 'cache'}"
    status, told, _ = thirdrail(path, "--for=sm86", cache, "--json")
    [refused] = json.loads(told)
    assert (status, refused["result"]) == (1, "failed")
    assert refused["reason"].endswith("say them, with the sizes that you use: --profile 'x=1,4,8'")
    status, told, _ = thirdrail(path, "--for=sm86", cache, "--json", "--profile", "x=1,4,8")
    assert (status, json.loads(told)[0]["result"]) == (0, "built")
    status, told, _ = thirdrail(str(repository / "given"), "--for=sm86", cache, "--json")
    assert json.loads(told)[0]["result"] == "cached"
    _, told, _ = thirdrail(path, "--for=sm86", cache, "--json", "--profile", "y=1,4,8")
    assert "profile.0.y: the model has no input 'y', its inputs are 'x'" in told


def test_inputs_that_come_again_are_of_a_further_profile() -> None:
    first, second = read_profiles(["x=1,4,8", "a=b=2x3,2x3,2x3", "x=9,9,9"])
    assert {name: write_shape_range(each) for name, each in first.items()} == {
        "x": "1,4,8",
        "a=b": "2x3,2x3,2x3",
    }
    assert [write_shape_range(each) for each in second.values()] == ["9,9,9"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1,4,8", "names no input; for example: --profile 'input=1x3x32x32,"),
        ("=1,4,8", "names no input"),
        ("x=1,4", "has 2 shapes, expected three: smallest,best,largest"),
        ("x=4,1,8", "has the sizes [4, 1, 8] on axis 0"),
    ],
)
def test_shapes_that_cannot_be_say_what_could(text: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_profiles([text])
    assert says in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--profile=x=1,4,8",), "is none: write profile.0.INPUT into its config.pbtxt"),
        (("--profile=x",), "names no input"),
        (("--engine=onnxruntime", "--for=sm86"), "plans are for this CPU"),
        (("--engine=torch", "--for=sm86"), "PyTorch's plans are for this CPU"),
        (("--build-minutes-max=0",), "--build-minutes-max"),
        (("--build-memory-gib=inf",), "--build-memory-gib must be a number of GiB"),
        (("--cache-gib=1e300",), "--cache-gib must be a number of GiB"),
        pytest.param(("--cache-gib=0",), "--cache-gib must be above 0", marks=pytest.mark.slow),
    ],
)
def test_wishes_that_cannot_be_are_refused(
    repository: Path, arguments: tuple[str, ...], says: str
) -> None:
    status, _, error = thirdrail(str(repository), *arguments)
    assert status == 2
    assert says in " ".join(error.replace("│", " ").split())


def test_pytorch_compiles_its_own_programs_alone(repository: Path) -> None:
    [onnx] = jobs(repository / "open/1/model.onnx", engine=EngineChoice.TORCH)
    assert (onnx.builder, onnx.fault) == (Builder.AOT_INDUCTOR, NO_PROGRAM)
    path = repository / "program/1/model.pt2"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK")
    [program] = jobs(path, engine=EngineChoice.TORCH)
    assert (program.builder, program.fault, program.title("")) == (
        Builder.AOT_INDUCTOR, "", "this CPU",
    )  # fmt: skip
    wanted = {"engine": "torch", "torch_compile": "aot_inductor"}
    (path.parents[1] / "config.pbtxt").write_text(parameters(**wanted))
    assert [each.builder for each in jobs(path.parents[1])] == [Builder.AOT_INDUCTOR]
    (path.parents[1] / "config.pbtxt").write_text(parameters(engine="torch"))
    assert [each.builder for each in jobs(path.parents[1])] == [Builder.ONNXRUNTIME]


def test_shapes_for_a_plan_that_takes_all_are_refused(repository: Path) -> None:
    path = repository / "open/1/model.onnx"
    profiles = read_profiles(["x=1,4,8"])
    with pytest.raises(InvalidArgument, match="a plan for this CPU, which takes every shape"):
        jobs(path, profiles=profiles)
    [job] = jobs(path, profiles=profiles, capabilities=("sm86",))
    assert job.options.profiles == profiles


def test_no_models_are_a_failure(repository: Path, tmp_path: Path) -> None:
    cache = f"--cache-dir={tmp_path / 'cache'}"
    status, _, error = thirdrail(str(repository / "given" / "1"), cache)
    assert (status, "holds no models" in error) == (1, True)


def test_one_reason_for_several_gpus_is_said_once(repository: Path, tmp_path: Path) -> None:
    write(repository, "open", double(), parameters(profile__0__x="1,4"))
    cache = f"--cache-dir={tmp_path / 'cache'}"
    _, told, _ = thirdrail(str(repository / "open"), "--for=sm86,sm89", cache)
    assert told.count("has 2 shapes") == told.count("open 1, sm86,sm89: ") == 1


def jobs(path: Path, **wish: Any) -> list[Job]:
    return list(jobs_at(path, Wish(**wish)))


def test_every_version_that_would_be_served_is_compiled(repository: Path) -> None:
    write(repository, "batched", two_layers(), BATCHES, version=2)
    write(repository, "both", double(), "version_policy { all {} }")
    write(repository, "both", double(), "version_policy { all {} }", version=3)
    found = [(job.model, job.version) for job in jobs(repository)]
    assert found == [("batched", 2), ("both", 1), ("both", 3), ("given", 1), ("open", 1)]
    assert [job.version for job in jobs(repository / "both")] == [1, 3]


def test_the_command_line_counts_more_than_the_configuration(repository: Path) -> None:
    config = BATCHES + parameters(engine="onnxruntime", precision="bf16")
    write(repository, "batched", two_layers(), config)
    [asked] = jobs(repository / "batched", capabilities=("sm86",))
    assert (asked.builder, asked.options.precision) == (Builder.ONNXRUNTIME, Precision.BF16)
    [other] = jobs(
        repository / "batched",
        engine=EngineChoice.TENSORRT_RTX,
        precision=Precision.FP16,
        capabilities=("sm86", "sm89"),
    )
    assert (other.builder, other.options.precision) == (Builder.TENSORRT_RTX, Precision.FP16)
    assert other.targets == ("sm86", "sm89")


def test_a_model_that_names_its_gpus_gets_one_plan_for_all_of_them(repository: Path) -> None:
    config = BATCHES + parameters(compute_capabilities="sm86,sm89")
    write(repository, "batched", two_layers(), config)
    [job] = jobs(repository / "batched", capabilities=("sm120",))
    assert (job.builder, job.targets) == (Builder.TENSORRT_RTX, ("",))
    assert job.title("") == "sm86,sm89"


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (BATCHES + parameters(engine="tensorrt_rtx"), NO_TARGET),
        (BATCHES + parameters(engine="x"), "parameters['engine'] is 'x'"),
        ("backend: 'python'", "models written in Python are not served"),
    ],
)
def test_what_cannot_be_compiled_says_why(repository: Path, config: str, fault: str) -> None:
    write(repository, "batched", two_layers(), config)
    [job] = jobs(repository / "batched")
    assert fault in job.fault


def test_a_file_of_another_kind_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    path.write_bytes(b"plan")
    with pytest.raises(InvalidArgument, match=r"expected a file that ends in .onnx, .pt2, .pt"):
        jobs(path)


def test_a_user_without_a_home_is_told_what_to_name(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    ended = CliRunner().invoke(app, ["compile", str(repository)], prog_name="thirdrail")
    assert ended.exit_code == 2
    assert "name a --cache-dir" in ended.output
