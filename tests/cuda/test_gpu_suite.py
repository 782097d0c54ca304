# SPDX-License-Identifier: Apache-2.0
"""What `make test-gpu` runs against a whole server passes on a twin: its own code is sound."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent


@pytest.mark.slow
def test_what_a_gpu_will_meet_passes_on_the_twin() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "gpu")],
        env=os.environ | {"THIRDRAIL_TEST_TWIN": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 10
