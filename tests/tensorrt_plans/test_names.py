# SPDX-License-Identifier: Apache-2.0
"""Every name of TensorRT that our code uses exists in every version that we promise.

TensorRT's own libraries are not on PyPI, its Python bindings are: they are imported here against a
library that has nothing but the functions which they link to. So this compares names, and runs no
code of TensorRT. Of TensorRT for RTX the real package is asked.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import thirdrail_engines.tensorrt
from support.environments import python_environment, run
from support.native_names import NativeNames, native_names
from thirdrail_engines.tensorrt.api import OPTIONAL

# The oldest and the newest, and between them those after which names came or went.
BINDINGS = (
    "tensorrt_cu12_bindings==10.0.1",
    "tensorrt_cu12_bindings==10.9.0.34",
    "tensorrt_cu13_bindings==10.13.2.6",
    "tensorrt_cu13_bindings==11.4.0.106",
)
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("libnvinfer.so", "libnvinfer_plugin.so", "libnvonnxparser.so")

# Prints which of the names are missing from a module.
ASK = """
import functools, importlib, json, sys
module = importlib.import_module(sys.argv[1])
def has(name):
    try:
        functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        # Functions that are there to be overridden alone are known to the class's text only.
        owner, _, method = name.partition(".")
        return f"def {method}(self" in (getattr(module, owner, None).__doc__ or "")
    return True
print(json.dumps([name for name in json.loads(sys.argv[2]) if not has(name)]))
"""


@pytest.fixture(scope="module")
def names() -> NativeNames:
    folder = Path(thirdrail_engines.tensorrt.__file__).parent
    return native_names(sorted(folder.glob("*.py")))


def missing(module: str, names: Iterable[str], **variables: str) -> set[str]:
    command = [sys.executable, "-W", "ignore", "-c", ASK, module, json.dumps(sorted(names))]
    done = run(command, variables)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_what_comes_out_of_tensorrt_is_annotated(names: NativeNames) -> None:
    assert names.unclear == []
    assert len(names.used) > 40


def test_what_only_some_versions_have_is_used_in_one_module(names: NativeNames) -> None:
    assert all(names.used.get(name) == {"api.py"} for name in OPTIONAL), names.used


def test_precision_is_never_a_flag(names: NativeNames) -> None:
    """10.x has flags that let layers choose their type; later versions have none."""
    assert "NetworkDefinitionCreationFlag.STRONGLY_TYPED" in names.used
    flags = {name for name in names.used if name.startswith("BuilderFlag.")}
    assert flags == {"BuilderFlag.REFIT", "BuilderFlag.VERSION_COMPATIBLE"}


@pytest.mark.needs_gcc
@pytest.mark.needs_packages
@pytest.mark.parametrize("bindings", BINDINGS)
def test_the_names_of_tensorrt(names: NativeNames, bindings: str, tmp_path: Path) -> None:
    environment = python_environment(bindings.replace("==", "-"), [bindings], dependencies=False)
    major = bindings.partition("==")[2].partition(".")[0]
    write_libraries(tmp_path, major)
    absent = missing(
        "tensorrt_bindings",
        names.used,
        LD_LIBRARY_PATH=str(tmp_path),
        PYTHONPATH=str(environment.packages()),
    )
    assert absent <= OPTIONAL
    if bindings == BINDINGS[0]:  # later ones have some of it
        assert absent == OPTIONAL


@pytest.mark.needs_tensorrt
def test_the_names_of_tensorrt_for_rtx(names: NativeNames) -> None:
    assert missing("tensorrt_rtx", names.used) == set()


def test_a_name_that_is_missing_is_found() -> None:
    assert missing("json", ["dumps", "nope", "JSONDecoder.nope"]) == {"nope", "JSONDecoder.nope"}


def test_what_breaks_the_rule_is_found(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(
        "def build(self, config: t.IBuilderConfig | None) -> t.Builder:\n"
        "    profile = config.make_profile()\n"
        "    trt.Builder(1).network().layers\n"
        "    named: t.ITensor = trt.BuilderFlag.REFIT.made\n"
        "    named.shape = 1\n"
        "    for layer in config.layers: pass\n"
        "    build(1).reset\n"
    )
    found = native_names([path])
    assert set(found.used) == {
        "Builder",
        "Builder.network",
        "Builder.reset",
        "BuilderFlag",
        "BuilderFlag.REFIT",
        "IBuilderConfig.layers",
        "IBuilderConfig.make_profile",
        "ITensor.shape",
    }
    assert [text.partition(" ")[0] for text in found.unclear] == [
        "code.py:2:",  # no annotation
        "code.py:3:",  # an attribute of a result that has no name
        "code.py:4:",  # an attribute of a member
        "code.py:6:",  # a loop over what is not annotated
    ]


def write_libraries(folder: Path, major: str) -> None:
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        target = folder / f"{library}.{major}"
        options = ["-shared", "-fPIC", f"-Wl,-soname,{target.name}"]
        subprocess.run(["gcc", *options, "-o", target, source], check=True, env=os.environ)
