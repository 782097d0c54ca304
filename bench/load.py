# SPDX-License-Identifier: Apache-2.0
"""The load generator: generated stubs in a process of its own, so that no server shares its GIL.

The synchronous stub is what most callers use. Many calls in flight are as many threads on unary
calls, and a window of unanswered requests on each stream.
"""

import contextlib
import itertools
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc

from bench.measure import Latencies, Slice, as_latencies
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import inference_pb2_grpc
from thirdrail_server.inference import grpc_service_pb2, grpc_service_pb2_grpc

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
ANSWER_S_MAX = 120


@dataclass(frozen=True, slots=True)
class Job:
    """What to send, where to and how.

    request: a serialized InferRequest, or ModelInferRequest for KServe.
    in_flight: calls without an answer at any time, over all streams together.
    streams: 0 for unary calls.
    """

    address: str
    request: bytes
    in_flight: int
    streams: int = 0
    is_kserve: bool = False


class LoadGenerator:
    """A process that does jobs. One job at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "LoadGenerator":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def run(self, job: Job, seconds: float) -> Slice:
        """Put the job's server under load for so long. Raises RuntimeError when a call fails."""
        self.start(job, seconds)
        return self.result()

    def start(self, job: Job, seconds: float) -> None:
        """The same in the background; `result` waits for its end."""
        self._pipe.send((job, seconds))

    def result(self) -> Slice:
        if not self._pipe.poll(ANSWER_S_MAX):
            raise RuntimeError(f"no answer from the load generator within {ANSWER_S_MAX} s")
        done = self._pipe.recv()
        if isinstance(done, str):
            raise RuntimeError(done)
        assert isinstance(done, Slice)
        return done


# In the load generator's process


def _work(pipe: Connection) -> None:
    channels: dict[str, grpc.Channel] = {}
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            job, seconds = pipe.recv()
            if job.address not in channels:
                channels[job.address] = grpc.insecure_channel(job.address, UNLIMITED)
            try:
                pipe.send(_slice(channels[job.address], job, seconds))
            except (grpc.RpcError, RuntimeError) as error:
                pipe.send(f"a call to {job.address} failed: {error}")


def _slice(channel: grpc.Channel, job: Job, seconds: float) -> Slice:
    run = _streams if job.streams else _unary
    cpu_started, started_ns = time.process_time(), time.monotonic_ns()
    latencies = run(channel, job, started_ns + int(seconds * 1e9))
    elapsed_s = (time.monotonic_ns() - started_ns) / 1e9
    return Slice(latencies, elapsed_s, time.process_time() - cpu_started)


def _unary(channel: grpc.Channel, job: Job, until_ns: int) -> Latencies:
    call, request = _stub_call(channel, job)
    latencies: list[int] = []

    def caller() -> None:
        now_ns = time.monotonic_ns()
        while now_ns < until_ns:
            call(request)
            started_ns, now_ns = now_ns, time.monotonic_ns()
            latencies.append(now_ns - started_ns)

    _together([caller] * job.in_flight)
    return as_latencies(latencies)


def _stub_call(channel: grpc.Channel, job: Job) -> tuple[Callable[[Any], Any], Any]:
    if job.is_kserve:
        kserve = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return kserve.ModelInfer, grpc_service_pb2.ModelInferRequest.FromString(job.request)
    stub = inference_pb2_grpc.InferenceStub(channel)
    return stub.Infer, pb.InferRequest.FromString(job.request)


def _streams(channel: grpc.Channel, job: Job, until_ns: int) -> Latencies:
    window, rest = divmod(job.in_flight, job.streams)
    assert not rest, "the calls in flight are shared evenly by the streams"
    stub = inference_pb2_grpc.InferenceStub(channel)
    latencies: list[int] = []

    def caller() -> None:
        _stream(stub, job, window, until_ns, latencies)

    _together([caller] * job.streams)
    return as_latencies(latencies)


def _stream(
    stub: inference_pb2_grpc.InferenceStub,
    job: Job,
    window: int,
    until_ns: int,
    latencies: list[int],
) -> None:
    """One stream: `window` requests, and another one for each answer."""
    requests = _Requests(job.request)
    for _ in range(window):
        requests.add()
    in_flight = window
    for response in stub.InferStream(iter(requests)):
        latencies.append(requests.answered(response.infer))
        if time.monotonic_ns() < until_ns:
            requests.add()
            continue
        in_flight -= 1
        if not in_flight:
            requests.end()


class _Requests:
    """The requests of one stream, each with a number of its own, sent when they are added."""

    def __init__(self, body: bytes) -> None:
        self._request = pb.InferRequest.FromString(body)
        self._numbers = itertools.count()
        self._to_send: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._started_ns: dict[int, int] = {}

    def add(self) -> None:
        self._to_send.put(next(self._numbers))

    def end(self) -> None:
        self._to_send.put(None)

    def answered(self, response: pb.InferResponse) -> int:
        """How long it took, in nanoseconds. Raises RuntimeError when the request failed."""
        if response.HasField("status"):
            raise RuntimeError(response.status.message)
        return time.monotonic_ns() - self._started_ns.pop(response.call)

    def __iter__(self) -> Iterator[pb.InferStreamRequest]:
        while (number := self._to_send.get()) is not None:
            self._request.call = number
            message = pb.InferStreamRequest(infer=self._request)
            self._started_ns[number] = time.monotonic_ns()
            yield message


def _together(callers: list[Callable[[], None]]) -> None:
    """Run them at the same time. Raises the first failure of any."""
    if len(callers) == 1:
        return callers[0]()
    failures: list[BaseException] = []

    def guarded(caller: Callable[[], None]) -> None:
        try:
            caller()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(caller,)) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
