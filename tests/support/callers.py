# SPDX-License-Identifier: Apache-2.0
"""One request, every native way in: unary, stream, lane. KServe's are in `kserve_callers`.

A test writes an `Ask` once; each caller puts it into its own protocol's words and turns what comes
back into an `Answer` or a `Failure`.
"""

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import numpy as np

from support.server import RunningServer
from support.worker import RunningWorker
from thirdrail.dtypes import BY_NAME, BY_VALUE, Buffer, dtype_of_array
from thirdrail.errors import Cancelled, ThirdrailError
from thirdrail.lane.aio import AsyncLane
from thirdrail.lane.calls import Call
from thirdrail.lane.encoding import LargeInput
from thirdrail.lane.hello import attach_lane
from thirdrail.lane.results import release_outputs
from thirdrail.statuses import REASON_KEY
from thirdrail.tensors import (
    Array,
    array_of_bytes,
    array_of_tensor,
    bytes_of_array,
    values_of_array,
)
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import inference_pb2_grpc, metrics_pb2, metrics_pb2_grpc, tensor_pb2

ANSWER_S_MAX = 60
INLINE_BYTES_MAX = 1 << 14
WAITERS = 32  # threads that wait for a blocking lane's answers


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as it is sent, true or not: its bytes need not fit its type and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: Buffer

    @classmethod
    def of(cls, name: str, array: Array) -> "WireTensor":
        return cls(name, dtype_of_array(array).name, array.shape, bytes_of_array(array))

    def array(self) -> Array:
        return array_of_bytes(self.name, BY_NAME[self.dtype], self.shape, self.raw)


def tensors(**arrays: Array) -> tuple[WireTensor, ...]:
    return tuple(WireTensor.of(name, array) for name, array in arrays.items())


@dataclass(frozen=True, slots=True)
class Ask:
    model: str
    inputs: Sequence[WireTensor]
    outputs: Sequence[str] = ()
    version: int = 0
    request_id: str = ""
    timeout_us: int = 0
    priority: int = 0
    classes: int = 0  # of every output in `outputs`
    as_values: bool = False  # inputs written out, KServe's typed contents


@dataclass(frozen=True, slots=True)
class Answer:
    outputs: Mapping[str, Array]  # in the order in which they came
    version: int
    request_id: str
    came_as_values: bool
    timing: pb.Timing | None  # None: this protocol has none


@dataclass(frozen=True, slots=True)
class Failure:
    text: str
    request_id: str | None = None  # None: this protocol does not repeat it
    reason: int | None = None  # None: this protocol has only a status
    status: grpc.StatusCode | None = None  # None: this protocol tells failures in band


Outcome = Answer | Failure


@dataclass(frozen=True, slots=True)
class Pending:
    future: Future[Outcome]
    cancel: Callable[[], object]

    def result(self) -> Outcome:
        return self.future.result(ANSWER_S_MAX)


class Caller(Protocol):
    """is_kserve: statuses and texts are those of KServe's column."""

    is_kserve: bool

    def submit(self, ask: Ask) -> Pending: ...
    def counters(self, model: str) -> metrics_pb2.ModelCounters: ...
    def close(self) -> None: ...


def infer(caller: Caller, model: str, inputs: Sequence[WireTensor], **options: Any) -> Outcome:
    return caller.submit(Ask(model, inputs, **options)).result()


# Native


def native_request(ask: Ask) -> pb.InferRequest:
    request = pb.InferRequest(
        model_name=ask.model,
        model_version=ask.version,
        request_id=ask.request_id,
        timeout_us=ask.timeout_us,
        priority=ask.priority,
    )
    for tensor in ask.inputs:
        sent = request.inputs.add(
            name=tensor.name,
            data_type=tensor_pb2.DataType.Value(f"DATA_TYPE_{tensor.dtype}"),
            shape=tensor.shape,
        )
        if ask.as_values:
            sent.values.CopyFrom(values_of_array(tensor.array()))
        else:
            sent.raw = bytes(tensor.raw)
    for name in ask.outputs:
        request.outputs.add(name=name, class_count=ask.classes)
    return request


def native_outcome(response: pb.InferResponse, data: Sequence[Buffer | None] = ()) -> Outcome:
    if response.status.reason:
        return Failure(response.status.message, response.request_id, reason=response.status.reason)
    outputs = {}
    for tensor, beside in itertools.zip_longest(response.outputs, data):
        dtype = BY_VALUE[tensor.data_type]
        if beside is None:
            outputs[tensor.name] = array_of_tensor(tensor)
        else:
            outputs[tensor.name] = array_of_bytes(tensor.name, dtype, tensor.shape, bytes(beside))
    return Answer(
        outputs,
        response.model_version,
        response.request_id,
        any(tensor.HasField("values") for tensor in response.outputs),
        response.timing if response.HasField("timing") else None,
    )


def _failed_call(call: Any) -> Failure:
    told = dict(call.trailing_metadata() or ())
    reason = pb.Reason.Value(told[REASON_KEY]) if REASON_KEY in told else None
    return Failure(call.details(), reason=reason, status=call.code())


def unary(call: Any, read: Callable[[Any], Outcome]) -> Pending:
    future: Future[Outcome] = Future()

    def ended(_: object) -> None:
        is_ok = call.code() is grpc.StatusCode.OK
        future.set_result(read(call.result()) if is_ok else _failed_call(call))

    call.add_done_callback(ended)
    return Pending(future, call.cancel)


class OverGrpc:
    def __init__(self, server: RunningServer) -> None:
        self._channel = server.channel()

    def counters(self, model: str) -> metrics_pb2.ModelCounters:
        stub = metrics_pb2_grpc.MetricsStub(self._channel)
        snapshot = stub.Snapshot(metrics_pb2.SnapshotRequest(), timeout=ANSWER_S_MAX)
        return next(each for each in snapshot.models if each.name == model)

    def close(self) -> None:
        self._channel.close()


class NativeUnary(OverGrpc):
    is_kserve = False

    def submit(self, ask: Ask) -> Pending:
        stub: Any = inference_pb2_grpc.InferenceStub(self._channel)
        call = stub.Infer.future(native_request(ask), timeout=ANSWER_S_MAX)
        return unary(call, native_outcome)


class NativeStream(OverGrpc):
    """All requests on one stream."""

    is_kserve = False

    def __init__(self, server: RunningServer) -> None:
        super().__init__(server)
        self._numbers = itertools.count(1)
        self._outgoing: queue.SimpleQueue[pb.InferStreamRequest | None] = queue.SimpleQueue()
        self._waiting: dict[int, Future[Outcome]] = {}
        stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._call: Any = stub.InferStream(iter(self._outgoing.get, None))
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def submit(self, ask: Ask) -> Pending:
        request = native_request(ask)
        request.call = next(self._numbers)
        future = self._waiting[request.call] = Future()
        self._outgoing.put(pb.InferStreamRequest(infer=request))
        cancel = pb.InferStreamRequest(cancel=pb.Cancel(call=request.call))
        return Pending(future, lambda: self._outgoing.put(cancel))

    def _read(self) -> None:
        for message in self._call:
            assert message.infer.final
            future = self._waiting.pop(message.infer.call)
            future.set_result(native_outcome(message.infer))

    def close(self) -> None:
        self._outgoing.put(None)
        self._reader.join(ANSWER_S_MAX)
        super().close()


class OverLane:
    """A lane of its own into a worker that no front is in the way of."""

    is_kserve = False

    def __init__(self, worker: RunningWorker) -> None:
        self._worker = worker
        self._lane: AsyncLane = worker.attach()

    def submit(self, ask: Ask) -> Pending:
        future = asyncio.run_coroutine_threadsafe(self._call(ask), self._worker.loop)
        return Pending(future, future.cancel)

    async def _call(self, ask: Ask) -> Outcome:
        request = native_request(ask)
        data: list[Buffer | None] = [None] * len(request.inputs)
        for index, tensor in enumerate(request.inputs):
            if tensor.HasField("raw"):
                data[index] = tensor.raw
                tensor.ClearField("raw")
        try:
            reply = await self._lane.call(request, data)
        except ThirdrailError as error:
            return Failure(error.message, reason=error.reason)
        try:
            return native_outcome(reply.response, reply.data)
        finally:
            reply.release()

    def counters(self, model: str) -> metrics_pb2.ModelCounters:
        return self._worker.counters()[model]

    def close(self) -> None:
        self._worker.loop.call_soon_threadsafe(self._lane.close)


class OverBlockingLane:
    """The blocking client's lane, below its arrays, so that requests can be wrong."""

    is_kserve = False

    def __init__(self, worker: RunningWorker) -> None:
        self._worker = worker
        self._lane = attach_lane(worker.sockets.pop(0))
        self._waiting = ThreadPoolExecutor(WAITERS)

    def submit(self, ask: Ask) -> Pending:
        call = Call(borrow=True)
        request = native_request(ask)
        large: list[LargeInput] = []
        for tensor in list(request.inputs):
            if len(tensor.raw) > INLINE_BYTES_MAX:
                raw = np.frombuffer(tensor.raw, np.uint8)
                tensor.ClearField("raw")
                large.append(LargeInput(tensor.name, tensor.SerializeToString(), raw))
                request.inputs.remove(tensor)
        fields = self._lane.talk.placer.place(call, large, None, None)
        body = request.SerializeToString() + b"".join(fields)
        try:
            self._lane.talk.send_call(call, body, None, None)
        except ThirdrailError as error:
            self._lane.talk.withdraw(call)
            refused = Failure(error.message, reason=error.reason)
            return Pending(self._waiting.submit(lambda: refused), lambda: None)
        future = self._waiting.submit(self._outcome, call)
        return Pending(future, lambda: self._lane.abandon(call))

    def _outcome(self, call: Call) -> Outcome:
        self._lane.wait(call, None)
        assert call.response is not None
        if call.is_abandoned:  # its memory is not ours to read
            return Failure("cancelled", reason=pb.REASON_CANCELLED)
        memory, response = self._lane.talk.memory, call.response
        data: list[Buffer | None] = []
        for tensor in response.outputs:
            is_leased = tensor.HasField("ref")
            data.append(memory.output_bytes(tensor.ref).tobytes() if is_leased else None)
        release_outputs(response, memory)
        return native_outcome(response, data)

    def counters(self, model: str) -> metrics_pb2.ModelCounters:
        return self._worker.counters()[model]

    def close(self) -> None:
        self._lane.close(Cancelled("the tests are over"))
        self._waiting.shutdown()
