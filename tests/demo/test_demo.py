# SPDX-License-Identifier: Apache-2.0
"""The demo as a whole: real models, a real server process, and nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.needs_packages, pytest.mark.timeout(600)]

DEMO = (sys.executable, "-m", "thirdrail_server.demo")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "models"
    subprocess.run([*DEMO, "--fetch-only", "--dir", str(folder)], check=True, timeout=500)
    return folder


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where the demo has to put whatever it needs for a while; must be empty afterwards. Not below
    pytest's folders, whose names leave a socket's little room."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        assert os.listdir(name) == []


def start_demo(models: Path, temporary: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DEMO, "--dir", str(models)],
        env={**os.environ, "TMPDIR": str(temporary), "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes_serving(models: Path) -> list[str]:
    return [
        " ".join(process.info["cmdline"])
        for process in psutil.process_iter(["cmdline"])
        if str(models) in (process.info["cmdline"] or [])
    ]


def test_every_answer_is_as_expected(models: Path, temporary: Path) -> None:
    demo = start_demo(models, temporary)
    output, _ = demo.communicate(timeout=300)
    assert demo.returncode == 0, output
    assert "answers are as expected" in output
    assert "WRONG" not in output
    for model in ("magika", "ocr_detection", "ocr_recognition", "silero_vad"):
        assert model in output
    assert processes_serving(models) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_demo_stops_its_server(
    models: Path, temporary: Path, number: signal.Signals
) -> None:
    demo = start_demo(models, temporary)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "server was ready" in line:
            break
    assert len(processes_serving(models)) > 1  # the demo and its server
    demo.send_signal(number)
    demo.communicate(timeout=60)
    assert demo.returncode != 0
    assert processes_serving(models) == []


def test_another_model_that_is_broken_changes_nothing(
    models: Path, temporary: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    shutil.copytree(models, repository, copy_function=os.link)
    broken = repository / "broken" / "1"
    broken.mkdir(parents=True)
    (broken / "model.onnx").write_bytes(b"this is no model")
    demo = start_demo(repository, temporary)
    output, _ = demo.communicate(timeout=300)
    assert demo.returncode == 0, output
