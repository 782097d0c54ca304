# SPDX-License-Identifier: Apache-2.0
"""What a sticky error does to a whole server: told at once, and everything comes back.

The device is a twin, in the worker process of a real server.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from server.test_lives import NOT_SERVING, SERVING, _snapshot, health, infer, infer_slowly, until
from support.models import gather, identity, slow, write
from support.server import RunningServer, running_server
from thirdrail.tensors import array_of_tensor, tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import inference_pb2_grpc
from thirdrail_server import exit_codes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    repository = tmp_path / "models"
    write(repository, "twin_gather", gather())
    write(repository, "twin_stuck", gather())
    write(repository, "identity", identity())
    write(repository, "slow", slow())
    with running_server(repository, tmp_path / "server", module="support.twin_server") as running:
        yield running


def pick(channel: grpc.Channel, index: int, model: str = "twin_gather") -> list[float]:
    inputs = [tensor_of_array("index", np.array([index], np.int64))]
    request = pb.InferRequest(model_name=model, inputs=inputs)
    response = inference_pb2_grpc.InferenceStub(channel).Infer(request, timeout=30)
    return list(array_of_tensor(response.outputs[0]))


def test_a_sticky_error_restarts_the_worker_and_the_models_come_back(
    server: RunningServer,
) -> None:
    with server.channel() as channel, ThreadPoolExecutor(1) as pool:
        assert pick(channel, 2) == [12]
        first = _snapshot(server).workers[0].pid
        running = pool.submit(infer_slowly, channel, 1_000_000)
        until(lambda: any(each.running for each in _snapshot(server).models))
        with pytest.raises(grpc.RpcError) as caught:
            pick(channel, 9)  # an illegal access, to the twin
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "the device was lost: " in str(caught.value.details())
        until(
            lambda: (
                health(channel, "twin_gather") == NOT_SERVING
                or _snapshot(server).workers[0].restarts == 1
            )
        )
        with pytest.raises(grpc.RpcError) as caught:
            running.result(timeout=30)  # of another model, in the same process
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        until(lambda: _snapshot(server).workers[0].restarts == 1)
        until(lambda: health(channel) == SERVING)  # all models
        assert pick(channel, 1) == [11]
        assert infer(channel, [1]) == [1]
        worker = _snapshot(server).workers[0]
        assert (worker.restarts, worker.pid != first) == (1, True)
    log = server.log_text()
    assert log.count("the device was lost: ") >= 1
    status = exit_codes.DEVICE_LOST
    assert f"worker 'cpu' died: exit status {status} (the device was lost); restarting in" in log


@pytest.mark.slow
def test_a_run_that_never_ends_is_a_lost_device(server: RunningServer) -> None:
    with server.channel() as channel:
        assert pick(channel, 2, "twin_stuck") == [12]
        with pytest.raises(grpc.RpcError) as caught:
            pick(channel, 3, "twin_stuck")
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        until(
            lambda: _snapshot(server).workers[0].restarts == 1
        )  # before, it may serve for a moment
        until(lambda: health(channel, "twin_stuck") == SERVING)
        assert pick(channel, 1, "twin_stuck") == [11]
    log = server.log_text()
    assert "the device was lost: a run has not ended within 0.75 s; this process ends" in log
    assert f"exit status {exit_codes.DEVICE_LOST} (the device was lost)" in log
