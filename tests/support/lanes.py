# SPDX-License-Identifier: Apache-2.0
"""Lanes of the blocking client: to a real worker, and to a peer that says what a test tells it."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Self, Unpack

from support.worker import RunningWorker
from thirdrail.errors import Cancelled
from thirdrail.lane.blocking import BlockingLane
from thirdrail.lane.encoding import Encoder
from thirdrail.lane.hello import attach_lane
from thirdrail.requests import InferOptions, Result, named_arrays
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2

PACKET_BYTES_MAX = 1 << 16


class Caller:
    """A lane as `Client` uses it, without a front or gRPC."""

    def __init__(self, lane: BlockingLane) -> None:
        self.lane = lane
        self._encoder = Encoder()

    def infer(self, model: str, arrays: dict[str, Any], **options: Unpack[InferOptions]) -> Result:
        head = self._encoder.options(model, None, options)
        return self.lane.infer(
            head,
            named_arrays(arrays, None),
            borrow=options.get("borrow", False),
            timeout=options.get("timeout"),
        )

    def submit(
        self, model: str, arrays: dict[str, Any], **options: Unpack[InferOptions]
    ) -> Future[Result]:
        head = self._encoder.options(model, None, options)
        return self.lane.submit(
            head,
            named_arrays(arrays, None),
            borrow=options.get("borrow", False),
            timeout=options.get("timeout"),
        )

    def close(self) -> None:
        self.lane.close(Cancelled("the test is over"))


@contextlib.contextmanager
def calling(worker: RunningWorker, *, is_debug: bool = False) -> Iterator[Caller]:
    """A caller on the worker's next unused lane; its first is the front's."""
    caller = Caller(attach_lane(worker.sockets.pop(), is_debug=is_debug))
    try:
        yield caller
    finally:
        caller.close()


class ScriptedPeer:
    """What a worker would be, at the other end of a socket: it sends what a test tells it."""

    LIMITS = lane_pb2.Limits(
        packet_bytes=PACKET_BYTES_MAX,
        inline_bytes=1 << 14,
        calls_in_flight=8,
        input_arena_bytes=1 << 24,
        output_arena_bytes=1 << 24,
    )

    def __init__(self) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        attaching = threading.Thread(target=self._attach)
        attaching.start()
        self.caller = Caller(attach_lane(ours, client_name="test"))
        attaching.join()

    def _attach(self) -> None:
        assert self.receive().hello.client_name == "test"
        attached = lane_pb2.Attached(
            version=1, limits=self.LIMITS, input_epoch=1, output_epoch=2, session=7
        )
        self.send(lane_pb2.LaneResponse(attached=attached))

    def receive(self) -> lane_pb2.LaneRequest:
        return lane_pb2.LaneRequest.FromString(self.sock.recv(PACKET_BYTES_MAX))

    def calls(self, count: int) -> list[pb.InferRequest]:
        """The next requests, whatever else comes in between."""
        found: list[pb.InferRequest] = []
        while len(found) < count:
            message = self.receive()
            if message.HasField("infer"):
                found.append(message.infer)
        return found

    def send(self, message: lane_pb2.LaneResponse) -> None:
        self.sock.send(message.SerializeToString())

    def answer(self, request: pb.InferRequest, **fields: Any) -> None:
        """With its inputs as outputs, unless `fields` of an InferResponse say otherwise."""
        fields.setdefault("outputs", request.inputs)
        response = pb.InferResponse(call=request.call, final=True, **fields)
        self.send(lane_pb2.LaneResponse(infer=response))

    def beside(self, work: Callable[[], Any]) -> "Future[Any]":
        """Run something in a thread, for as long as this peer needs the test's own."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.caller.close()
        self.sock.close()
