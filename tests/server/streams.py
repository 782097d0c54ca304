# SPDX-License-Identifier: Apache-2.0
"""What tests of streams send, on streams of both protocols, and what they look at meanwhile."""

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from onnx import helper

from support.models import model, tensor
from thirdrail.tensors import array_of_tensor, tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import inference_pb2_grpc, metrics_pb2, metrics_pb2_grpc
from thirdrail_server.inference import grpc_service_pb2 as kserve
from thirdrail_server.inference import grpc_service_pb2_grpc as kserve_grpc

LONG = 60_000  # turns of the slow model: 0.3 s at least
MIB = 1 << 20


def zeros() -> onnx.ModelProto:
    """y = so many zeros as n says: a small request with a large result."""
    node = helper.make_node("ConstantOfShape", ["n"], ["y"])
    return model([node], [tensor("n", "INT64", (1,))], [tensor("y", "FP32", ("size",))])


class Sender:
    """What goes into a stream, one by one; an iterator for gRPC."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._queue.get, None)

    def send(self, *messages: object) -> None:
        for message in messages:
            self._queue.put(message)

    def end(self) -> None:
        self._queue.put(None)


def native_stream(channel: grpc.Channel, messages: Iterable[Any], **options: Any) -> Any:
    return inference_pb2_grpc.InferenceStub(channel).InferStream(iter(messages), **options)


def kserve_stream(channel: grpc.Channel, messages: Iterable[Any], **options: Any) -> Any:
    return kserve_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(messages), **options)


def infer(
    call: int, name: str = "identity", *, turns: int = LONG, **fields: Any
) -> pb.InferStreamRequest:
    arrays = {
        "identity": {"x": np.array([call], np.float32)},
        "slow": {"x": np.array([call], np.float32), "turns": np.array(turns)},
        "zeros": {"n": np.array([MIB // 4])},
    }
    inputs = [tensor_of_array(key, array) for key, array in arrays.get(name, {}).items()]
    fields.setdefault("model_name", name)
    return pb.InferStreamRequest(infer=pb.InferRequest(call=call, inputs=inputs, **fields))


def cancel(call: int) -> pb.InferStreamRequest:
    return pb.InferStreamRequest(cancel=pb.Cancel(call=call))


def kserve_infer(request_id: str, name: str, *, turns: int = LONG) -> kserve.ModelInferRequest:
    request = kserve.ModelInferRequest(model_name=name, id=request_id)
    for tensor_ in infer(1, name, turns=turns).infer.inputs:
        array = array_of_tensor(tensor_)
        datatype = "INT64" if array.dtype == np.int64 else "FP32"
        request.inputs.add(name=tensor_.name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(tensor_.raw)
    return request


def counters(channel: grpc.Channel, name: str) -> metrics_pb2.ModelCounters:
    snapshot = metrics_pb2_grpc.MetricsStub(channel).Snapshot(
        metrics_pb2.SnapshotRequest(), timeout=30
    )
    return next(each for each in snapshot.models if each.name == name)


def is_idle(channel: grpc.Channel, name: str) -> bool:
    now = counters(channel, name)
    return not now.running and not now.queued


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a stream ended that has nothing more to say."""
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    return caught.value.code(), caught.value.details() or ""
