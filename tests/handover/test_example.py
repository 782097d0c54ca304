# SPDX-License-Identifier: Apache-2.0
"""examples/handover: three processes, real models, one page."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from thirdrail_server.demo import page
from thirdrail_server.demo.text_boxes import Box, detection_input

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "handover"


def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_it_says_what_it_takes() -> None:
    helped = run("--help")
    assert helped.returncode == 0
    for option in ("--dir", "--wheels", "--pages"):
        assert option in helped.stdout


@pytest.mark.parametrize("service", ["camera.py", "detector.py", "reader.py"])
def test_a_service_without_a_server_says_so(service: str, tmp_path: Path) -> None:
    characters = tmp_path / "characters.txt"
    characters.write_text("a\n")
    command = [sys.executable, str(EXAMPLE / service), f"--url={tmp_path / 'no.sock'}"]
    command += [f"--characters={characters}"] if service == "reader.py" else []
    line = (
        '{"number": 1, "is_last": true, "token": "tr1_AAAAAAAAAAAAAAAAAAAAAA", "page_bytes": 1}\n'
    )
    failed = subprocess.run(command, input=line, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1
    assert "thirdrail.failures.Unreachable" in failed.stderr


def test_the_page_is_what_the_model_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    import pages

    picture = page.render()
    height, width = picture.shape[:2]
    planes = np.empty((1, 3, height, width), np.float32)
    pages.write(planes, picture)
    assert np.allclose(planes, detection_input(picture), atol=1e-6)
    box = Box(40, 40, 300, 90)
    assert np.array_equal(pages.crop(planes, box), picture[40:90, 40:300])
    assert pages.has_ink(planes, box)
    assert not pages.has_ink(planes, Box(0, 0, 20, 20))
    assert not pages.has_ink(planes, Box(5, 5, 5, 20))


@pytest.mark.needs_packages
@pytest.mark.timeout(600)
def test_three_services_read_a_page_that_is_written_once(tmp_path: Path) -> None:
    ended = run("--dir", str(tmp_path / "models"), "--pages=2", timeout=500)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("written once") == 2
    for line in page.LINES:
        assert ended.stdout.count(f"    {line.text}\n") == 2
    for hand_over in ("camera -> detector", "detector -> reader"):
        said = [line.split() for line in ended.stdout.splitlines() if hand_over in line]
        assert [words[-2:] for words in said] == [["0", "copies"]] * 2
    left = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(process.info["cmdline"] or [])
    ]
    assert not left
