# SPDX-License-Identifier: Apache-2.0
"""What a worker says of its models' memory, and that it lets none go that is in use."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from support.killable import until
from support.models import constant, identity, model, slow, tensor, write
from support.worker import RunningWorker, running_worker
from thirdrail.errors import NotFound
from thirdrail.tensors import tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.config import WorkerConfig
from thirdrail_server.control_messages import Resident, WorkerMemory
from thirdrail_server.repository.sizes import files_bytes

MIB = 1 << 20


@pytest.fixture
def worker() -> Iterator[RunningWorker]:
    with running_worker(WorkerConfig(loads_at_once_max=1)) as running:
        yield running


def memory(worker: RunningWorker) -> WorkerMemory:
    return WorkerMemory.from_fields(worker.run(worker.control.call("memory")))


def evict(worker: RunningWorker, name: str) -> Any:
    return worker.run(worker.control.call("evict", {"name": name}))["evicted"]


def weights(mib: int) -> Any:
    rows = mib * MIB // 4096
    matrix = constant("w", np.ones((rows, 1024), np.float32))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    inputs, outputs = [tensor("x", "FP32", ("n", rows))], [tensor("y", "FP32", ("n", 1024))]
    return model([node], inputs, outputs, [matrix])


def test_a_model_weighs_what_its_weights_do_and_the_first_one_no_more(
    worker: RunningWorker, tmp_path: Path
) -> None:
    write(tmp_path, "large", weights(20))
    write(tmp_path, "small", identity())
    worker.load(tmp_path, "small", "large")
    sizes = {each.name: each.size for each in memory(worker).residents}
    assert sizes["small"] < MIB / 2
    assert 20 * MIB <= sizes["large"] < 20.5 * MIB
    counted = {name: each.memory_bytes for name, each in worker.counters().items()}
    assert counted == sizes
    assert worker.status().model_bytes == memory(worker).total == sum(sizes.values())
    worker.unload("large")
    assert memory(worker).total == sizes["small"]


# In a process of its own: the heap is the whole process's, and threads that other tests have left
# give back memory at any moment.
OFF_THE_SCALE = """
import sys
from pathlib import Path
import numpy as np
from thirdrail_engines import use_one_arena
from thirdrail_server.worker.memory import Scale

use_one_arena()
folder, mib, scale = Path(sys.argv[1]), 1 << 20, Scale()
with scale.weigh() as building:
    before = np.ones(mib, np.uint8)
    with building.aside():
        with scale.weigh() as other:
            others = np.ones(8 * mib, np.uint8)
            weight = other.end(folder)
        assert weight.is_measured
        assert weight.size >= others.nbytes, weight
    after = np.ones(2 * mib, np.uint8)
    weight = building.end(folder)
assert weight.is_measured
assert before.nbytes + after.nbytes <= weight.size < 4 * mib, weight
with scale.weigh() as one, scale.weigh() as two:
    assert not one.end(folder).is_measured
    assert not two.end(folder).is_measured
"""


def test_who_waits_for_a_build_is_off_the_scale(tmp_path: Path) -> None:
    """What another load takes meanwhile is weighed, and is not counted in."""
    command = [sys.executable, "-c", OFF_THE_SCALE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_that_runs_is_busy_and_is_not_evicted(
    worker: RunningWorker, tmp_path: Path
) -> None:
    write(tmp_path, "slow", slow())
    worker.load(tmp_path, "slow")
    (loaded,) = memory(worker).residents
    assert loaded == Resident("slow", loaded.size, loaded.used_ms)
    lane = worker.attach()

    def is_evicted_while_it_runs(turns: int) -> bool:
        inputs = [
            tensor_of_array("x", np.ones(1, np.float32)),
            tensor_of_array("turns", np.array(turns)),
        ]
        request = pb.InferRequest(model_name="slow", inputs=inputs)
        call = asyncio.run_coroutine_threadsafe(lane.call(request, [None, None]), worker.loop)
        until(lambda: memory(worker).residents[0].is_busy or call.done())
        is_evicted = bool(evict(worker, "slow"))
        assert not call.result(60).response.status.reason
        return is_evicted

    if is_evicted_while_it_runs(30_000):  # it was over before anybody looked, on a busy machine
        worker.load(tmp_path, "slow")
        assert not is_evicted_while_it_runs(1_000_000)
    while memory(worker).residents[0].is_busy:  # the answer goes out before the run is put away
        assert worker.process.poll() is None
    assert memory(worker).residents[0].used_ms > loaded.used_ms
    assert evict(worker, "slow") is True
    assert memory(worker) == WorkerMemory([], 0)
    with pytest.raises(NotFound):
        evict(worker, "slow")


def test_the_files_of_a_version_are_its_model_and_the_weights_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x" * 10)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "weights.bin").write_bytes(b"x" * 100)
    (tmp_path / "linked.bin").symlink_to(tmp_path / "more" / "weights.bin")
    (tmp_path / "gone.bin").symlink_to("nowhere")
    assert files_bytes(tmp_path) == 210
    assert files_bytes(tmp_path / "missing") == 0
