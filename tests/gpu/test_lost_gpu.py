# SPDX-License-Identifier: Apache-2.0
"""A real server whose GPU meets a sticky error: it says so, and comes back from the plan cache.

Not yet run on a GPU, which it needs: a twin's is in tests/cuda/test_lost_device.py.
"""

from pathlib import Path

import grpc
import numpy as np
import pytest

from server.test_lives import SERVING, _snapshot, health, until
from support.models import gather, write
from support.server import running_server
from thirdrail.tensors import array_of_tensor, tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import inference_pb2_grpc
from thirdrail_server import exit_codes


def pick(channel: grpc.Channel, index: int) -> list[float]:
    inputs = [tensor_of_array("index", np.array([index], np.int64))]
    request = pb.InferRequest(model_name="wild", inputs=inputs)
    response = inference_pb2_grpc.InferenceStub(channel).Infer(request, timeout=60)
    return list(array_of_tensor(response.outputs[0]))


def test_a_sticky_error_restarts_the_worker(needs_gpu: None, is_twin: bool, tmp_path: Path) -> None:
    if is_twin:
        pytest.skip("a twin launches no kernels")
    write(tmp_path / "models", "wild", gather())
    cache = f"--cache-dir={tmp_path / 'cache'}"
    with (
        running_server(
            tmp_path / "models", tmp_path, [cache], module="support.gpu_server"
        ) as server,
        server.channel() as channel,
    ):
        assert pick(channel, 2) == [12]
        with pytest.raises(grpc.RpcError) as caught:
            pick(channel, 9)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        until(lambda: sum(worker.restarts for worker in _snapshot(server).workers) == 1)
        until(lambda: health(channel, "wild") == SERVING)
        assert pick(channel, 1) == [11]
        status = exit_codes.DEVICE_LOST
        assert f"exit status {status} (the device was lost)" in server.log_text()
