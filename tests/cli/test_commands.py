# SPDX-License-Identifier: Apache-2.0
"""Every command against a real server: what people and programs read, and the exit codes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import models
from support.server import RunningServer

Thirdrail = Callable[..., Any]


def test_models(thirdrail: Thirdrail) -> None:
    plain, found = thirdrail("models"), thirdrail("models", "--json").json
    assert plain.code == 0
    assert plain.out.splitlines()[0].split()[:3] == ["MODEL", "VERSION", "STATE"]
    assert any(line.split()[:3] == ["add", "1", "ready"] for line in plain.out.splitlines())
    [add] = [model for model in found if model["name"] == "add"]
    assert (add["version"], add["state"], add["worker"]) == (1, "ready", "cpu")


def test_describe(thirdrail: Thirdrail) -> None:
    found = thirdrail("describe", "add", "--json").json
    assert [(t["name"], t["datatype"], t["shape"]) for t in found["inputs"]] == [
        ("a", "FP32", [-1, 4]),
        ("b", "FP32", [-1, 4]),
    ]
    assert found["batch_rows_max"] == 8
    lines = thirdrail("describe", "add").out.splitlines()
    assert "up to 8 rows a batch" in lines[0]
    assert ["output", "c", "FP32", "[-1,", "4]"] in [line.split() for line in lines]
    assert "max_batch_size: 8" in thirdrail("describe", "add", "--config").out


def test_infer_prints_the_outputs(thirdrail: Thirdrail) -> None:
    done = thirdrail("infer", "add", "-i", "a=1,2,3,4", "--input", "b=[[1, 1, 1, 0.5]]")
    assert done.code == 0
    assert "[[2.  3.  4.  4.5]]" in done.out
    found = thirdrail("infer", "add", "-i", "a=1,2,3,4", "-i", "b=0,0,0,nan", "--json").json
    assert found["outputs"] == {
        "c": {"datatype": "FP32", "shape": [1, 4], "data": [[1.0, 2.0, 3.0, "NaN"]]}
    }
    assert found["timing"]["compute_ns"] > 0


@pytest.mark.parametrize(
    ("model", "text", "data"),
    [
        ("identity_bool", "x=true,0,1", [True, False, True]),
        ("identity_int8", "x=-128,0x7f", [-128, 127]),
        ("identity_uint64", "x=18446744073709551615", [18446744073709551615]),
        ("identity_fp16", "x=1e9", ["Infinity"]),
        ("identity_bytes", "x=a, b=c", ["a, b=c"]),
        ("identity_bytes", 'x=["a", "b"]', ["a", "b"]),
        ("identity_fp32", "x=[]", []),
    ],
)
def test_values_take_the_declared_type(
    thirdrail: Thirdrail, model: str, text: str, data: list[Any]
) -> None:
    assert thirdrail("infer", model, "-i", text, "--json").json["outputs"]["y"]["data"] == data


def test_files_in_and_out(thirdrail: Thirdrail, tmp_path: Path) -> None:
    given = np.array([0.25, -1], np.float32)
    np.save(tmp_path / "in.npy", given)
    saved = tmp_path / "out.npy"
    done = thirdrail("infer", "identity_fp32", f"-ix=@{tmp_path}/in.npy", f"--save={saved}")
    assert f"saved to {saved}" in done.out
    np.testing.assert_array_equal(np.load(saved), given, strict=True)

    (tmp_path / "raw").write_bytes(given.tobytes())
    both = tmp_path / "out.npz"
    thirdrail("infer", "identity_fp32", f"-ix=@{tmp_path}/raw", f"--save={both}")
    np.testing.assert_array_equal(np.load(both)["y"], given, strict=True)

    (tmp_path / "list.json").write_text("[1, 2]")
    found = thirdrail("infer", "identity_int32", f"-ix=@{tmp_path}/list.json", "--json").json
    assert found["outputs"]["y"]["data"] == [1, 2]

    page = tmp_path / "out.txt"
    thirdrail("infer", "identity_bytes", "-ix=@-", f"--save={page}", stdin="häl\n".encode())
    assert page.read_text() == "häl\n"


def test_classes(thirdrail: Thirdrail) -> None:
    found = thirdrail("infer", "classifier", "-i", "x=0.1,0.7,0.2", "--classes", "2", "--json").json
    best = [text.split(":")[2] for text in found["outputs"]["scores"]["data"][0]]
    assert best == ["dog", "fish"]


def test_options_of_a_request(thirdrail: Thirdrail) -> None:
    args = ("--request-id=r7", "--version=1", "--timeout=9", "--priority=0", "-oy")
    found = thirdrail("infer", "identity_fp32", "-ix=1", *args, "--json").json
    assert (found["request_id"], found["version"]) == ("r7", 1)


def test_health(thirdrail: Thirdrail) -> None:
    assert thirdrail("health").out == "serving\n"
    assert thirdrail("health", "add", "--json").json == {"model": "add", "serving": True}
    assert thirdrail("health", "add", "--wait", "5").code == 0
    missing = thirdrail("health", "nowhere")
    assert (missing.code, missing.out) == (1, "")


def test_metrics(thirdrail: Thirdrail) -> None:
    assert "# TYPE " in thirdrail("metrics").out
    thirdrail("infer", "identity_int16", "-i", "x=1")
    models = thirdrail("metrics", "--json").json["models"]
    [found] = [model for model in models if model["name"] == "identity_int16"]
    assert found["requests_ok"] >= 1
    assert found["requests_failed"] == 0


def test_top(thirdrail: Thirdrail) -> None:
    lines = thirdrail("top", "--once", "--interval", "0.1").out.splitlines()
    assert lines[0].startswith("thirdrail 0.")
    assert lines[2].split()[:3] == ["MODEL", "VER", "REQ/S"]
    assert any(line.split()[:2] == ["add", "1"] for line in lines)
    assert any(line.split()[:2] == ["cpu", "serving"] for line in lines)
    found = thirdrail("top", "--interval", "0.1", "--json").json
    assert 0.05 < found["interval_s"] < 60
    assert found["workers"][0]["resident_bytes"] > 1 << 20


def test_top_once_counts_since_the_start(thirdrail: Thirdrail) -> None:
    thirdrail("infer", "identity_int32", "-i", "x=1")
    found = thirdrail("top", "--once", "--json").json
    assert found["interval_s"] == found["uptime_s"]
    [model] = [each for each in found["models"] if each["name"] == "identity_int32"]
    assert model["requests_per_s"] > 0
    assert model["latency_ms_mean"] > 0


# -- the server says no ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("infer", "nowhere"), "unknown model: 'nowhere'"),
        (("infer", "add"), "expected 2 inputs but got 0"),
        (("infer", "gather", "-i", "index=9"), "Error: "),
        (("describe", "nowhere"), "unknown model: 'nowhere'"),
    ],
)
def test_refusals_are_exit_code_1(thirdrail: Thirdrail, args: tuple[str, ...], text: str) -> None:
    done = thirdrail(*args)
    assert (done.code, done.out) == (1, "")
    assert text in done.err
    assert "Traceback" not in done.err


def test_refusals_for_programs(thirdrail: Thirdrail) -> None:
    done = thirdrail("infer", "nowhere", "--json")
    assert done.code == 1
    error = json.loads(done.err)["error"]
    assert error["reason"] == "NOT_FOUND"
    assert "nowhere" in error["message"]
    assert error["notes"] == ["`thirdrail models` lists what this server has"]


def test_loading_is_off_by_default(thirdrail: Thirdrail) -> None:
    for command in ("load", "unload"):
        done = thirdrail(command, "add")
        assert (done.code, done.out) == (1, "")
        assert "--model-control explicit" in done.err


def test_load_and_unload(
    start_server: Callable[..., RunningServer], typed: Thirdrail, tmp_path: Path
) -> None:
    models.write(tmp_path / "repository", "echo", models.identity())
    server = start_server(tmp_path / "repository", "--model-control=explicit", "--load-model=echo")
    url = f"--url={server.url}"
    assert typed("unload", "echo", url).out == "echo is unloaded\n"
    assert typed("infer", "echo", "-i", "x=1", url).code == 1
    (tmp_path / "repository/broken/1").mkdir(parents=True)
    (tmp_path / "repository/broken/1/model.onnx").write_bytes(b"no model")
    assert "not a readable ONNX file" in typed("load", "broken", url).err
    done = typed("infer", "broken", "-i", "x=1", url)
    assert (done.code, "'broken' has no available versions" in done.err) == (1, True)
    done = typed("load", "echo", url)
    assert (done.code, done.out, done.err) == (0, "echo is ready: version 1\n", "")
    config = tmp_path / "other.pbtxt"
    config.write_text("max_batch_size: 2")
    found = typed("load", "echo", "--config", str(config), "--json", url).json
    assert found == {"model": "echo", "versions": [1]}
    assert typed("describe", "echo", "--json", url).json["batch_rows_max"] == 2
    assert typed("unload", "echo", "--json", url).json == {"model": "echo", "unloaded": True}
    models.write(tmp_path / "repository", "echo", models.identity(), "version_policy { all {} }", 2)
    (tmp_path / "repository/echo/3").mkdir()
    (tmp_path / "repository/echo/3/model.onnx").write_bytes(b"no model")
    done = typed("load", "echo", url)
    assert (done.code, done.out) == (0, "echo is ready: version 1, 2\n")
    assert done.err.startswith("echo 3: model.onnx: not a readable ONNX file")
    assert "3, unavailable: model.onnx: not a" in typed("describe", "echo", "--version=3", url).out


# -- the command line is wrong, or nobody answers ----------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("nothing",), "No such command"),
        (("infer",), "Missing argument"),
        (("infer", "add", "-i", "a"), "NAME=VALUE"),
        (("infer", "add", "-i", "a=1", "-i", "a=2"), "given twice"),
        (("infer", "add", "-i", "z=1"), "unknown input 'z'"),
        (("infer", "add", "-i", "a=1,2,3"), "3 elements do not fit"),
        (("infer", "add", "-i", "a=one"), "got 'one'"),
        (("infer", "add", "-i", "a=[1"), "not JSON"),
        (("infer", "add", "-i", "a=@/nowhere.npy"), "cannot read"),
        (("infer", "identity_int8", "-i", "x=128"), "does not fit INT8"),
        (("infer", "identity_int8", "-i", "x=1.5"), "expected INT8"),
        (("infer", "identity_bytes", "-i", "x=a", "--save", "y.npy"), "BYTES"),
        (("infer", "identity_bytes", "-i", "x=a", "--save", "/none/y"), "cannot write /none/y"),
        (("infer", "identity_int8", "-i", "x=1", "--save", "/none/y.npy"), "No such file"),
        (("health", "--url", "http://here"), "expected host:port"),
        (("health", "--url"), "Option '--url' requires an argument"),
        (("load", "add", "--config", "/nowhere"), "does not exist"),
        (("load", "add", "--config", sys.executable), "no text in UTF-8"),
        (("health", "--tls-ca", "/nowhere"), "does not exist"),
        (("health", "--tls-cert", "/dev/null"), "needs both cert and key"),
    ],
)
def test_mistakes_are_exit_code_2(thirdrail: Thirdrail, args: tuple[str, ...], text: str) -> None:
    done = thirdrail(*args)
    assert (done.code, done.out) == (2, "")
    assert text in " ".join(done.err.replace("│", " ").split())


def test_nobody_there_is_exit_code_3(typed: Thirdrail, tmp_path: Path) -> None:
    done = typed("models", "--url", f"unix:{tmp_path}/nobody.sock")
    assert (done.code, done.out) == (3, "")
    assert "thirdrail serve REPOSITORY" in done.err
