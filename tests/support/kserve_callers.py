# SPDX-License-Identifier: Apache-2.0
"""The KServe ways in, as callers: ModelInfer and ModelStreamInfer."""

import queue
import threading
from concurrent.futures import Future
from typing import Any

import grpc

from support.callers import ANSWER_S_MAX, Answer, Ask, Failure, Outcome, OverGrpc, Pending, unary
from support.server import RunningServer
from thirdrail.dtypes import BY_NAME
from thirdrail.tensors import array_of_bytes
from thirdrail_server.inference import grpc_service_pb2 as kserve
from thirdrail_server.inference import grpc_service_pb2_grpc as kserve_grpc

# KServe's typed contents; FP16 and BF16 have none.
CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def kserve_request(ask: Ask) -> kserve.ModelInferRequest:
    request = kserve.ModelInferRequest(
        model_name=ask.model,
        model_version=str(ask.version) if ask.version else "",
        id=ask.request_id,
    )
    if ask.timeout_us:
        request.parameters["timeout"].int64_param = ask.timeout_us
    if ask.priority:
        request.parameters["priority"].uint64_param = ask.priority
    for tensor in ask.inputs:
        sent = request.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=tensor.shape)
        if ask.as_values:
            elements = getattr(sent.contents, CONTENTS[tensor.dtype])
            elements.extend(tensor.array().ravel().tolist())
        else:
            request.raw_input_contents.append(bytes(tensor.raw))
    for name in ask.outputs:
        output = request.outputs.add(name=name)
        if ask.classes:
            output.parameters["classification"].int64_param = ask.classes
    return request


def kserve_answer(response: kserve.ModelInferResponse) -> Answer:
    outputs = {
        tensor.name: array_of_bytes(tensor.name, BY_NAME[tensor.datatype], tensor.shape, raw)
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    came_as_values = any(tensor.HasField("contents") for tensor in response.outputs)
    return Answer(outputs, int(response.model_version), response.id, came_as_values, None)


class KServeUnary(OverGrpc):
    is_kserve = True

    def submit(self, ask: Ask) -> Pending:
        stub: Any = kserve_grpc.GRPCInferenceServiceStub(self._channel)
        call = stub.ModelInfer.future(kserve_request(ask), timeout=ANSWER_S_MAX)
        return unary(call, kserve_answer)


class KServeStream(OverGrpc):
    """All requests on one stream, until one is cancelled: the protocol cancels whole streams."""

    is_kserve = True

    def __init__(self, server: RunningServer) -> None:
        super().__init__(server)
        self._stream: _OrderedStream | None = None

    def submit(self, ask: Ask) -> Pending:
        if self._stream is None or self._stream.is_cancelled:
            self._stream = _OrderedStream(self._channel)
        return self._stream.submit(kserve_request(ask))

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        super().close()


class _OrderedStream:
    """Replies come in the order of the requests."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.is_cancelled = False
        self._outgoing: queue.SimpleQueue[kserve.ModelInferRequest | None] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[Future[Outcome]] = queue.SimpleQueue()
        stub: Any = kserve_grpc.GRPCInferenceServiceStub(channel)
        self._call = stub.ModelStreamInfer(iter(self._outgoing.get, None))
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def submit(self, request: kserve.ModelInferRequest) -> Pending:
        future: Future[Outcome] = Future()
        self._waiting.put(future)
        self._outgoing.put(request)
        return Pending(future, self._cancel)

    def _cancel(self) -> None:
        self.is_cancelled = True
        self._call.cancel()

    def _read(self) -> None:
        try:
            for message in self._call:
                self._waiting.get().set_result(_streamed(message))
        except grpc.RpcError as error:
            failure = Failure(error.details() or "", status=error.code())
            while not self._waiting.empty():
                self._waiting.get().set_result(failure)

    def close(self) -> None:
        self._outgoing.put(None)
        self._reader.join(ANSWER_S_MAX)


def _streamed(message: kserve.ModelStreamInferResponse) -> Outcome:
    if message.error_message:
        assert not message.infer_response.outputs
        return Failure(message.error_message, message.infer_response.id)
    assert message.infer_response.parameters["triton_final_response"].bool_param
    return kserve_answer(message.infer_response)
