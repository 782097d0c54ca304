# SPDX-License-Identifier: Apache-2.0
"""Requests that nobody means: damaged, random, too many, cut off. Afterwards all is as before."""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import StartServer
from support.callers import Answer, Ask, Caller, Failure, NativeUnary, native_request, tensors
from support.kserve_callers import KServeUnary, kserve_request
from support.models import slow, write
from support.server import RunningServer, running_server
from thirdrail.dtypes import object_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.inference import grpc_service_pb2 as kserve

MIB = 1 << 20
CALL_S_MAX = 20
Status = grpc.StatusCode

ROW = np.array([[1, 2, 3, 4]], np.float32)
TEXT = object_array([b"", b"two", b"three"], [3])
ASKS = [
    Ask("plus_one", tensors(a=ROW), request_id="r"),
    Ask("add", tensors(a=ROW, b=ROW), outputs=["c"], priority=1),
    Ask("identity_bytes", tensors(x=TEXT)),
    Ask("identity_int8", tensors(x=np.array([-1, 1], np.int8)), as_values=True),
    Ask("identity_bf16", tensors(x=np.zeros(2, np.float16))),
    Ask("gather", tensors(index=np.array([0, 3])), timeout_us=5_000_000),
    Ask("classifier", tensors(x=ROW[:, :3]), outputs=["scores"], classes=2),
]

# What a request may end with, however it looks. Never UNKNOWN: that is an exception that got away.
EXPECTED = {
    Status.OK,
    Status.INVALID_ARGUMENT,
    Status.NOT_FOUND,
    Status.UNIMPLEMENTED,
    Status.RESOURCE_EXHAUSTED,
    Status.DEADLINE_EXCEEDED,  # a random timeout passed
    Status.UNAVAILABLE,  # the same over KServe
}


@pytest.fixture(scope="module")
def server(
    standard_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    with running_server(standard_repository, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with server.channel() as channel:
        yield channel


class Footprint:
    """What the front and the worker hold."""

    def __init__(self, server: RunningServer) -> None:
        self.pids = [server.pid, server.worker_pid()]
        processes = [psutil.Process(pid) for pid in self.pids]
        self.resident = [process.memory_info().rss for process in processes]
        self.fds = [process.num_fds() for process in processes]
        self.children = len(processes[0].children(recursive=True))

    def is_no_larger(self, before: "Footprint") -> bool:
        assert self.pids == before.pids
        resident = zip(self.resident, before.resident, strict=True)
        fds = zip(self.fds, before.fds, strict=True)
        return (
            self.children <= before.children
            and all(now - then < 20 * MIB for now, then in resident)
            and all(now <= then + 1 for now, then in fds)  # gRPC opens some of its own late
        )

    def __str__(self) -> str:
        return f"{self.children} children, {self.resident} bytes, {self.fds} descriptors"


# Damaged and random requests


@st.composite
def damaged(draw: st.DrawFn, bodies: list[bytes]) -> bytes:
    """A valid message with a few bytes changed, inserted, removed or repeated, or cut short."""
    body = bytearray(draw(st.sampled_from(bodies)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(len(body) - 1, 0)))
        end = at + draw(st.integers(0, 12))
        kind = draw(st.sampled_from(["change", "insert", "remove", "repeat", "cut"]))
        if kind == "change" and body:
            body[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            body[at:at] = draw(st.binary(max_size=6))
        elif kind == "remove":
            del body[at:end]
        elif kind == "repeat":
            body[at:at] = body[at:end]
        elif kind == "cut":
            del body[at:]
    return bytes(body)


names = st.sampled_from(["a", "b", "c", "x", "index", "", "ü", "\n", "x" * 5000])
models = st.sampled_from(["plus_one", "add", "identity_bytes", "classifier", "gather", "no", ""])
int64s = st.integers(-2, 9) | st.integers(-(1 << 63), (1 << 63) - 1)
uint32s = st.integers(0, 4) | st.integers(0, (1 << 32) - 1)
uint64s = st.integers(0, 4) | st.integers(0, (1 << 64) - 1)
shapes = st.lists(int64s, max_size=4)

native_messages = st.builds(
    pb.InferRequest,
    call=uint64s,
    model_name=models,
    model_id=st.integers(0, 1),
    model_version=int64s,
    request_id=st.text(max_size=8),
    inputs=st.lists(
        st.builds(
            pb.InferRequest().inputs.add().__class__,
            name=names,
            data_type=st.integers(-1, 20),
            shape=shapes,
            raw=st.binary(max_size=40),
        ),
        max_size=4,
    ),
    outputs=st.lists(
        st.builds(pb.RequestedOutput, name=names, form=st.integers(-1, 4), class_count=uint32s),
        max_size=3,
    ),
    priority=uint32s,
    timeout_us=uint64s,
    traceparent=st.text(max_size=8),
).map(lambda message: message.SerializeToString())

kserve_parameters = st.dictionaries(
    st.sampled_from(["priority", "timeout", "sequence_id", "triton_x", "mine"]),
    st.one_of(
        st.builds(kserve.InferParameter, int64_param=int64s),
        st.builds(kserve.InferParameter, uint64_param=uint64s),
        st.builds(kserve.InferParameter, string_param=st.text(max_size=4)),
    ),
    max_size=2,
)
kserve_messages = st.builds(
    kserve.ModelInferRequest,
    model_name=models,
    model_version=st.sampled_from(["", "1", "0", "-1", "one", "9" * 40]),
    id=st.text(max_size=8),
    parameters=kserve_parameters,
    inputs=st.lists(
        st.builds(
            kserve.ModelInferRequest.InferInputTensor,
            name=names,
            datatype=st.sampled_from(["FP32", "BYTES", "INT64", "", "fp32"]),
            shape=shapes,
            contents=st.none()
            | st.builds(
                kserve.InferTensorContents, fp32_contents=st.lists(st.floats(width=32), max_size=4)
            ),
        ),
        max_size=3,
    ),
    outputs=st.lists(
        st.builds(
            kserve.ModelInferRequest.InferRequestedOutputTensor,
            name=names,
            parameters=st.dictionaries(
                st.just("classification"),
                st.builds(kserve.InferParameter, int64_param=int64s),
                max_size=1,
            ),
        ),
        max_size=2,
    ),
    raw_input_contents=st.lists(st.binary(max_size=40), max_size=3),
).map(lambda message: message.SerializeToString())

NATIVE = "/thirdrail.v1.Inference/Infer"
NATIVE_STREAM = "/thirdrail.v1.Inference/InferStream"
KSERVE = "/inference.GRPCInferenceService/ModelInfer"
KSERVE_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"

native_bodies = [native_request(ask).SerializeToString() for ask in ASKS]
kserve_bodies = [kserve_request(ask).SerializeToString() for ask in ASKS if not ask.as_values]


def in_stream(body: bytes) -> bytes:
    """As field 1 of an InferStreamRequest."""
    size, prefix = len(body), bytearray(b"\x0a")
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*prefix, size]) + body


WAYS: dict[str, st.SearchStrategy[bytes]] = {
    NATIVE: damaged(native_bodies) | native_messages,
    NATIVE_STREAM: damaged([in_stream(body) for body in native_bodies])
    | native_messages.map(in_stream),
    KSERVE: damaged(kserve_bodies) | kserve_messages,
    KSERVE_STREAM: damaged(kserve_bodies) | kserve_messages,
}


def raw_unary(channel: grpc.Channel, method: str) -> Any:
    """Bytes in and out."""
    return channel.unary_unary(method)


def raw_stream(channel: grpc.Channel, method: str) -> Any:
    return channel.stream_stream(method)


def throw(channel: grpc.Channel, path: str, count: int) -> None:
    """So many messages; over streams a few at a time."""
    raw = raw_stream(channel, path) if "Stream" in path else raw_unary(channel, path)
    several = 4 if "Stream" in path else 1

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(WAYS[path], min_size=1, max_size=several))
    def send(bodies: list[bytes]) -> None:
        code, text = Status.OK, ""
        try:
            if several == 1:
                raw(bodies[0], timeout=CALL_S_MAX)
            else:
                list(raw(iter(bodies), timeout=CALL_S_MAX))
        except grpc.RpcError as error:
            code, text = error.code(), error.details() or ""
        assert code in EXPECTED, text
        assert "internal error" not in text
        assert "Error" not in text, "the name of an exception"

    send()


@pytest.mark.parametrize("path", WAYS)
@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_requests_change_nothing(
    server: RunningServer, channel: grpc.Channel, path: str, count: int
) -> None:
    callers: list[Caller] = [NativeUnary(server), KServeUnary(server)]
    throw(channel, path, 60)  # what grows only once has grown
    before = Footprint(server)
    throw(channel, path, count)
    _until(lambda: Footprint(server).is_no_larger(before), lambda: f"{Footprint(server)}, {before}")
    for caller in callers:
        for ask in ASKS[:4]:
            if not (caller.is_kserve and ask.as_values):
                assert isinstance(caller.submit(ask).result(), Answer)
        caller.close()
    assert "Traceback" not in server.log_text()


@pytest.mark.parametrize(
    "method",
    [
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/RepositoryModelLoad",
        "/thirdrail.v1.Inference/Infer",
        "/thirdrail.v1.Models/List",
        "/thirdrail.v1.Metrics/Snapshot",
        "/grpc.health.v1.Health/Check",
    ],
)
def test_bytes_that_are_no_message_are_the_callers_mistake(
    server: RunningServer, channel: grpc.Channel, method: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw_unary(channel, method)(b"\xff\xff", timeout=CALL_S_MAX)
    assert caught.value.code() is Status.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("a message of 2 bytes is not ")
    assert "Traceback" not in server.log_text()


@pytest.mark.parametrize(
    "method",
    [
        "/inference.GRPCInferenceService/ModelStreamInfer",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/thirdrail.v1.Models/Watch",
        "/thirdrail.v1.Models/Load",
        "/grpc.health.v1.Health/Watch",
    ],
)
def test_the_same_on_streams(server: RunningServer, channel: grpc.Channel, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(raw_stream(channel, method)(iter([b"\xff\xff"]), timeout=CALL_S_MAX))
    assert caught.value.code() is Status.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("a message of 2 bytes is not ")
    assert "Traceback" not in server.log_text()


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    for method in ("/thirdrail.v1.Inference/None", "/none/None"):
        with pytest.raises(grpc.RpcError) as caught:
            raw_unary(channel, method)(b"", timeout=CALL_S_MAX)
        assert caught.value.code() is Status.UNIMPLEMENTED


# A crowd, and the death of the worker among it


class Crowd:
    """Callers that each send one request after the other and count how each one ended."""

    def __init__(self, server: RunningServer) -> None:
        self.ends: list[Answer | Failure] = []
        self.sent = itertools.count()
        self._is_over = threading.Event()
        makers: list[Callable[[RunningServer], Caller]] = [NativeUnary, KServeUnary] * 4
        self._callers = [make(server) for make in makers]
        self._threads = [threading.Thread(target=self._call, args=(c,)) for c in self._callers]

    def _call(self, caller: Caller) -> None:
        ask = Ask("slow", tensors(x=ROW[0], turns=np.array(200)))
        while not self._is_over.is_set():
            pending = [caller.submit(ask) for _ in range(8)]
            for call in pending:
                next(self.sent)
                self.ends.append(call.result())

    def last_end_is(self, kind: type) -> bool:
        return bool(self.ends) and isinstance(self.ends[-1], kind)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in self._threads:
                thread.join(60)
            for caller in self._callers:
                caller.close()


@pytest.mark.slow
def test_every_request_ends_once_when_the_worker_dies(
    tmp_path: Path, start_server: StartServer
) -> None:
    write(tmp_path, "slow", slow())
    server = start_server(tmp_path)
    crowd = Crowd(server)
    with crowd.calling():
        for _ in range(2):
            _until(lambda: _has_worker(server) and crowd.last_end_is(Answer))
            os.kill(server.worker_pid(), signal.SIGKILL)
            _until(lambda: crowd.last_end_is(Failure))
        _until(lambda: _has_worker(server) and crowd.last_end_is(Answer))
    assert len(crowd.ends) == next(crowd.sent), "each exactly once"
    failures = [end for end in crowd.ends if isinstance(end, Failure)]
    assert failures
    assert {failure.status for failure in failures} == {Status.UNAVAILABLE}
    assert "Traceback" not in server.log_text()


def _has_worker(server: RunningServer) -> bool:
    with contextlib.suppress(StopIteration, psutil.Error):  # gone, or dead and not yet buried
        return server.worker_pid() > 0
    return False


def _until(is_so: Callable[[], bool], what: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)
