# SPDX-License-Identifier: Apache-2.0
"""A real gRPC server that speaks thirdrail.v1 and echoes: what the client's own tests call."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc

from thirdrail.statuses import REASON_KEY, REASONS
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import (
    inference_pb2_grpc,
    metrics_pb2,
    metrics_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    tensor_pb2,
)


class EchoServer(
    inference_pb2_grpc.InferenceServicer,
    models_pb2_grpc.ModelsServicer,
    metrics_pb2_grpc.MetricsServicer,
):
    """Models: "echo" gives back its inputs; "held" does so once `release` is set; "fails" answers
    with the reason that its parameter "reason" names; "in parts" says that more is to come; on a
    stream, "breaks" ends the whole stream."""

    def __init__(self, socket: Path) -> None:
        self.url = f"unix:{socket}"
        self.release = threading.Event()
        self.cancelled: list[str] = []  # request ids
        self.requests: list[pb.InferRequest] = []
        self.described = 0
        self.serving = True
        self._held: dict[int, pb.InferRequest] = {}  # by call; of one stream
        self.in_flight_most = 0
        self.spec = tensor_pb2.TensorSpec(
            name="x", data_type=tensor_pb2.DATA_TYPE_FP32, shape=[-1, 2]
        )

    def Infer(self, request: pb.InferRequest, context: Any) -> pb.InferResponse:
        is_answered = threading.Event()

        def note_cancel() -> None:
            if not is_answered.is_set():
                self.cancelled.append(request.request_id)

        context.add_callback(note_cancel)
        answer = self._answer(request)
        is_answered.set()
        if answer.status.reason:
            status = REASONS[answer.status.reason].status
            reason = pb.Reason.Name(answer.status.reason)
            context.set_trailing_metadata(((REASON_KEY, reason),))
            context.abort(status, answer.status.message)
        return answer

    def InferStream(
        self, messages: Iterator[pb.InferStreamRequest], context: Any
    ) -> Iterator[pb.InferStreamResponse]:
        answers: SimpleQueue[pb.InferResponse | None] = SimpleQueue()
        broken = threading.Event()

        def read() -> None:
            # Leaving the pool waits for those that are held; a cancelled call ends the messages.
            with suppress(grpc.RpcError), ThreadPoolExecutor(64) as pool:
                for message in messages:
                    if message.infer.model_name == "breaks":
                        broken.set()
                        answers.put(None)
                    self._take(message, answers, pool)
            answers.put(None)

        threading.Thread(target=read, daemon=True).start()
        for answer in iter(answers.get, None):
            yield pb.InferStreamResponse(infer=answer)
        if broken.is_set():
            context.abort(grpc.StatusCode.UNAVAILABLE, "the stream broke")

    def _take(
        self,
        message: pb.InferStreamRequest,
        answers: "SimpleQueue[pb.InferResponse | None]",
        pool: ThreadPoolExecutor,
    ) -> None:
        request = message.infer
        if message.HasField("cancel"):
            gone = self._held.pop(message.cancel.call, None)
            if gone is not None:
                self.cancelled.append(gone.request_id)
                status = pb.Status(reason=pb.REASON_CANCELLED, message="cancelled")
                answers.put(pb.InferResponse(call=gone.call, final=True, status=status))
        elif request.model_name == "held":
            self._held[request.call] = request
            self.in_flight_most = max(self.in_flight_most, len(self._held))
            pool.submit(self._answer_held, request, answers)
        else:
            answers.put(self._answer(request))

    def _answer_held(
        self, request: pb.InferRequest, answers: "SimpleQueue[pb.InferResponse | None]"
    ) -> None:
        self.release.wait(10)
        if self._held.pop(request.call, None) is not None:
            answers.put(self._answer(request))

    def _answer(self, request: pb.InferRequest) -> pb.InferResponse:
        self.requests.append(request)
        answer = pb.InferResponse(
            call=request.call,
            request_id=request.request_id,
            final=request.model_name != "in parts",
            model_name=request.model_name,
            model_version=request.model_version or 1,
            outputs=request.inputs,
            parameters=request.parameters,
            timing=pb.Timing(compute_ns=5, transport="grpc"),
        )
        if request.model_name == "fails":
            name = request.parameters["reason"].string_value
            answer.status.reason = pb.Reason.Value(name)
            answer.status.message = f"it failed with {name}"
        if request.model_name == "held":
            self.release.wait(10)
        return answer

    def List(self, request: models_pb2.ListRequest, context: Any) -> models_pb2.ListResponse:
        return models_pb2.ListResponse(models=[self._status()])

    def _status(self) -> models_pb2.ModelStatus:
        ready = models_pb2.MODEL_STATE_READY
        return models_pb2.ModelStatus(name="echo", version=1, state=ready, engine="e", worker="w")

    def Describe(self, request: Any, context: Any) -> models_pb2.DescribeResponse:
        self.described += 1
        if request.name == "nowhere":
            context.set_trailing_metadata(((REASON_KEY, "REASON_NOT_FOUND"),))
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown model 'nowhere'")
        names = ["a", "b"] if request.name == "two inputs" else [self.spec.name]
        specs = [
            tensor_pb2.TensorSpec(name=n, data_type=self.spec.data_type, shape=self.spec.shape)
            for n in names
        ]
        return models_pb2.DescribeResponse(status=self._status(), inputs=specs, outputs=specs)

    def Load(self, request: Any, context: Any) -> Iterator[models_pb2.LoadResponse]:
        yield models_pb2.LoadResponse(phase="reading", step=1, steps=2)
        yield models_pb2.LoadResponse(phase="ready", step=2, steps=2, done=True, versions=[1, 3])

    def Unload(self, request: Any, context: Any) -> models_pb2.UnloadResponse:
        self.serving = False
        return models_pb2.UnloadResponse()

    def Watch(self, request: Any, context: Any) -> Iterator[models_pb2.WatchResponse]:
        context.add_callback(lambda: self.cancelled.append("watch"))
        yield models_pb2.WatchResponse(status=self._status(), initial=True)
        while context.is_active():
            yield models_pb2.WatchResponse(status=self._status())
            self.release.wait(0.05)

    def Scrape(self, request: Any, context: Any) -> metrics_pb2.ScrapeResponse:
        return metrics_pb2.ScrapeResponse(text="thirdrail_up 1\n")

    def Snapshot(self, request: Any, context: Any) -> metrics_pb2.SnapshotResponse:
        return metrics_pb2.SnapshotResponse(uptime_ns=1, server_version="0")

    def check(self, data: bytes, context: Any) -> bytes:
        if data[2:] == b"nowhere":
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service 'nowhere'")
        return b"\x08\x01" if self.serving else b"\x08\x02"


def start(servicer: EchoServer) -> grpc.Server:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(16), options=options)
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    models_pb2_grpc.add_ModelsServicer_to_server(servicer, server)
    metrics_pb2_grpc.add_MetricsServicer_to_server(servicer, server)
    check: Any = grpc.unary_unary_rpc_method_handler(servicer.check)
    handler = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(servicer.url)
    server.start()
    return server
