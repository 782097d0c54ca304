# SPDX-License-Identifier: Apache-2.0
"""Which package is there, and what it builds for."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from thirdrail_engines.plans import Builder, BuildError, BuildFault
from thirdrail_engines.tensorrt import capability_names, check_capabilities, installed_builders
from thirdrail_engines.tensorrt.api import load_api

InstallTensorrt = Callable[[str, str], None]


@pytest.fixture
def install_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstallTensorrt:
    """install_tensorrt(version, code): a package called `tensorrt`, for this test."""

    def install(version: str, code: str) -> None:
        (tmp_path / "tensorrt").mkdir()
        (tmp_path / "tensorrt" / "__init__.py").write_text(code)
        info = tmp_path / f"tensorrt-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        importlib.invalidate_caches()

    return install


def test_neither_package_is_imported_to_be_found() -> None:
    code = (
        "import sys, thirdrail_engines.tensorrt as tensorrt\n"
        "tensorrt.installed_builders()\n"
        "assert not {'tensorrt', 'tensorrt_rtx', 'onnx'} & sys.modules.keys(), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    assert installed_builders() == ()
    for builder, expected in (
        (Builder.TENSORRT, "TensorRT is not installed. Run: pip install tensorrt"),
        (
            Builder.TENSORRT_RTX,
            "TensorRT for RTX is not installed. Run: pip install 'thirdrail[tensorrt]'",
        ),
    ):
        with pytest.raises(BuildError) as caught:
            load_api(builder)
        assert (caught.value.fault, str(caught.value)) == (BuildFault.MISSING, expected)


def test_a_version_below_the_floor(install_tensorrt: InstallTensorrt) -> None:
    install_tensorrt("8.6.1", "")
    assert (Builder.TENSORRT, "8.6.1") in installed_builders()
    with pytest.raises(BuildError, match=r"TensorRT 8\.6\.1 is installed, 10\.0 or newer is"):
        load_api(Builder.TENSORRT)


def test_a_package_without_its_libraries(install_tensorrt: InstallTensorrt) -> None:
    install_tensorrt("10.13.2.6", "raise OSError('libnvinfer.so.10: cannot open shared object')")
    with pytest.raises(BuildError) as caught:
        load_api(Builder.TENSORRT)
    assert caught.value.fault is BuildFault.MISSING
    assert str(caught.value) == (
        "TensorRT 10.13.2.6 is installed and cannot be imported: "
        "libnvinfer.so.10: cannot open shared object"
    )


def test_the_package_without_targets(install_tensorrt: InstallTensorrt) -> None:
    install_tensorrt("10.13.2.6", "")
    assert capability_names(Builder.TENSORRT) == ("current",)
    assert check_capabilities(Builder.TENSORRT, ["current"]) == ("current",)
    with pytest.raises(BuildError) as caught:
        check_capabilities(Builder.TENSORRT, ["sm86"])
    assert str(caught.value) == (
        "TensorRT builds for the GPU at hand only, not for sm86 (Ampere: A10, RTX 30) by name: "
        "leave compute_capabilities out and build on that GPU, or take tensorrt_rtx"
    )


def test_no_capabilities_need_no_package() -> None:
    assert check_capabilities(Builder.TENSORRT, []) == ()


@pytest.mark.needs_tensorrt
def test_capabilities_have_one_spelling() -> None:
    names = ["SM120", "sm_86", "8.6", " sm75 ", "12.0"]
    assert check_capabilities(Builder.TENSORRT_RTX, names) == ("sm75", "sm86", "sm120")
    assert check_capabilities(Builder.TENSORRT_RTX, ["current"]) == ("current",)


@pytest.mark.needs_tensorrt
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["sm90"],
            "TensorRT for RTX does not build for sm90 (Hopper: H100, H200), only for current, "
            "sm75, sm80, sm86, sm89, sm120, sm121. For such a GPU take the engine tensorrt, which "
            "builds on the GPU itself",
        ),
        (["sm86", "sm865"], "'sm865' is no compute capability, expected some of sm50, "),
        (["rtx4090"], "'rtx4090' is no compute capability, expected some of sm50, "),
        (
            ["sm86", "current"],
            "compute capabilities sm86, current: 'current' goes with no other. Name the others "
            "only, or leave all out",
        ),
    ],
)
def test_capabilities_that_cannot_be_had(names: list[str], expected: str) -> None:
    with pytest.raises(BuildError) as caught:
        check_capabilities(Builder.TENSORRT_RTX, names)
    assert caught.value.fault is BuildFault.REFUSED
    assert str(caught.value).startswith(expected)
