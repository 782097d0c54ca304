# SPDX-License-Identifier: Apache-2.0
"""Work that the device never does, where no thread of a run tells: the worker ends all the same."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cuda_lane.conftest import CONFIG, TESTS
from support.device_peer import DevicePeer, on_device
from support.lane_peer import connect
from support.models import double, write
from support.worker import RunningWorker, running_worker
from thirdrail.errors import ThirdrailError
from thirdrail_server import exit_codes

WAIT_S_MAX = 30
# A run of the model takes at most support.twin_worker.STUCK_S.
NAME = "twin_stuck_double"
WARM_UP = """
model_warmup { name: 'first' count: 1 inputs { key: 'x' value { data_type: TYPE_FP32 dims: 4
    random_data: true } } }
"""


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "closed"


@pytest.fixture
def worker(tmp_path: Path, gate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningWorker]:
    monkeypatch.setenv("THIRDRAIL_TEST_GATE", str(gate))
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    listen = tmp_path / "lane.sock"
    with running_worker(CONFIG, listen=listen, module="support.twin_lane_worker") as running:
        yield running


@pytest.mark.slow
def test_a_run_whose_results_stay_on_the_device(
    worker: RunningWorker, tmp_path: Path, gate: Path
) -> None:
    write(tmp_path, NAME, double())
    worker.load(tmp_path, NAME)
    assert worker.lane_path is not None
    peer = DevicePeer(connect(worker.lane_path))
    peer.attach(token=worker.open_session().token, features=["device"])
    peer.ask_for_device()
    x = np.arange(8, dtype=np.float32)
    source = peer.put(peer.grow_on_device(x.nbytes), x)
    gate.touch()
    peer.record_in_ready(1)
    answer = peer.answer(on_device(1, 1, {"x": source}, NAME, ["y"]))
    assert not answer.HasField("status")  # the device has it
    assert worker.process.wait(WAIT_S_MAX) == exit_codes.DEVICE_LOST
    peer.close()


@pytest.mark.slow
def test_a_run_while_its_model_is_loaded(worker: RunningWorker, tmp_path: Path, gate: Path) -> None:
    write(tmp_path, NAME, double(), WARM_UP)
    gate.touch()
    with pytest.raises(ThirdrailError):
        worker.load(tmp_path, NAME)
    assert worker.process.wait(WAIT_S_MAX) == exit_codes.DEVICE_LOST
