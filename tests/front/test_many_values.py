# SPDX-License-Identifier: Apache-2.0
"""Values written out one by one: more than a packet of the lane takes are served as well."""

import grpc
import numpy as np
import pytest

from support.server import RunningServer
from thirdrail.tensors import array_of_tensor
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import inference_pb2_grpc, tensor_pb2


def request_of(values: list[float], size: int) -> pb.InferRequest:
    tensor = tensor_pb2.Tensor(
        name="x",
        data_type=tensor_pb2.DATA_TYPE_FP32,
        shape=[size],
        values=tensor_pb2.Values(floats=values),
    )
    return pb.InferRequest(model_name="identity_fp32", inputs=[tensor])


@pytest.mark.parametrize("count", [1, 1000, 3000, 100_000])
def test_any_number_of_values_is_served(server: RunningServer, count: int) -> None:
    values = [float(number) for number in range(count)]
    with server.channel() as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        unary = stub.Infer(request_of(values, count), timeout=30)
        (streamed,) = stub.InferStream(
            iter([pb.InferStreamRequest(infer=request_of(values, count))]), timeout=30
        )
    for response in (unary, streamed.infer):
        assert not response.status.reason, response.status
        assert np.array_equal(array_of_tensor(response.outputs[0]), np.array(values, np.float32))


def test_too_few_of_many_values_are_refused(server: RunningServer) -> None:
    with server.channel() as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Infer(request_of([1.0] * 99_999, 100_000), timeout=30)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "needs 100000 values, got 99999" in (caught.value.details() or "")
