# SPDX-License-Identifier: Apache-2.0
"""Streams of both protocols against a real server: order, ends, backpressure, what they leave."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from conftest import StartServer
from server.streams import (
    LONG,
    MIB,
    Sender,
    cancel,
    counters,
    failure,
    infer,
    is_idle,
    kserve_infer,
    kserve_stream,
    native_stream,
    until,
    zeros,
)
from support.models import identity, slow, write
from support.server import RunningServer, running_server
from thirdrail.tensors import array_of_tensor
from thirdrail.v1 import inference_pb2 as pb

IN_FLIGHT_MAX = 8
Status = grpc.StatusCode


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    write(folder, "identity", identity())
    write(folder, "slow", slow())
    write(folder, "zeros", zeros())
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    arguments = [f"--max-stream-requests={IN_FLIGHT_MAX}"]
    with running_server(repository, tmp_path_factory.mktemp("server"), arguments) as running:
        yield running


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with server.channel() as channel:
        yield channel
    assert "Traceback" not in server.log_text()


# Order and ends


def test_native_answers_overtake_each_other_and_carry_their_calls(channel: grpc.Channel) -> None:
    messages = [infer(7, "slow"), infer(9), infer(8, "none"), infer(1 << 63)]
    answers = [each.infer for each in native_stream(channel, messages)]
    assert answers[-1].call == 7
    assert sorted(each.call for each in answers) == [7, 8, 9, 1 << 63]
    (failed,) = (each for each in answers if each.call == 8)
    assert failed.status.reason == pb.REASON_NOT_FOUND
    assert all(each.final for each in answers)
    assert all(list(array_of_tensor(each.outputs[0])) == [9] for each in answers if each.call == 9)


def test_kserve_answers_keep_the_order_of_their_requests(channel: grpc.Channel) -> None:
    messages = [kserve_infer(str(n), name) for n, name in enumerate(("slow", "identity") * 2)]
    answers = [each.infer_response for each in kserve_stream(channel, messages)]
    assert [each.id for each in answers] == ["0", "1", "2", "3"]
    assert [each.model_name for each in answers] == ["slow", "identity"] * 2


def test_half_close_finishes_what_was_sent(channel: grpc.Channel) -> None:
    """More than may be in flight: the rest is read when there is room."""
    sent = range(1, 3 * IN_FLIGHT_MAX)
    answers = list(native_stream(channel, [infer(call) for call in sent]))
    assert sorted(each.infer.call for each in answers) == list(sent)
    replies = list(kserve_stream(channel, [kserve_infer(str(n), "identity") for n in sent]))
    assert [each.infer_response.id for each in replies] == [str(n) for n in sent]


def test_an_empty_stream_ends_well(channel: grpc.Channel) -> None:
    assert list(native_stream(channel, [])) == []
    assert list(kserve_stream(channel, [])) == []


def test_call_numbers_may_be_used_again_after_the_answer(channel: grpc.Channel) -> None:
    sender = Sender()
    stream = native_stream(channel, sender)
    for _ in range(3):
        sender.send(infer(5))
        assert next(stream).infer.call == 5
    sender.end()
    assert list(stream) == []


def test_a_call_number_that_is_in_use_ends_the_stream(channel: grpc.Channel) -> None:
    """Nobody could tell which request an answer belongs to."""
    stream = native_stream(channel, [infer(5, "slow"), infer(5, "slow")])
    code, text = failure(stream)
    assert code is Status.INVALID_ARGUMENT
    assert text == "call 5 is in flight already on this stream"
    until(lambda: is_idle(channel, "slow"))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "a stream request holds neither 'infer' nor 'cancel'"),
        (b"\x1a\x00", "a stream request holds neither 'infer' nor 'cancel'"),
        (b"\xff", "a message of 1 bytes is not a thirdrail.v1.InferStreamRequest"),
        (b"\x0a\x7f", "a message of 2 bytes is not a thirdrail.v1.InferStreamRequest"),
    ],
)
def test_a_message_that_is_none_ends_the_stream(
    channel: grpc.Channel, body: bytes, text: str
) -> None:
    raw: Any = channel.stream_stream("/thirdrail.v1.Inference/InferStream")
    sender = Sender()
    stream = raw(iter(sender))
    sender.send(infer(1, "slow").SerializeToString(), body)
    assert failure(stream) == (Status.INVALID_ARGUMENT, text)
    until(lambda: is_idle(channel, "slow"))


def test_model_ids_belong_to_their_stream(channel: grpc.Channel) -> None:
    def by_id(call: int, model_id: int) -> pb.InferStreamRequest:
        return infer(call, "identity", model_name="", model_id=model_id)

    first, second = Sender(), Sender()
    one, other = native_stream(channel, first), native_stream(channel, second)
    first.send(by_id(1, 3), infer(2, model_id=3), by_id(3, 3))
    answers = {each.infer.call: each.infer for each in (next(one) for _ in range(3))}
    assert answers[1].status.reason == pb.REASON_NOT_FOUND
    assert answers[1].status.message == "model id 3 is not bound on this stream"
    assert list(array_of_tensor(answers[3].outputs[0])) == [3]
    second.send(by_id(1, 3))
    assert next(other).infer.status.reason == pb.REASON_NOT_FOUND
    first.send(infer(4, "slow", model_id=3))  # bound anew
    first.send(by_id(5, 3))
    renamed = {each.infer.call: each.infer for each in (next(one) for _ in range(2))}
    assert renamed[4].model_name == "slow"
    assert renamed[5].status.reason == pb.REASON_INVALID_ARGUMENT, "slow takes two inputs"
    first.end()
    second.end()


def test_the_deadline_of_a_stream_is_that_of_its_requests(channel: grpc.Channel) -> None:
    before = counters(channel, "slow")
    stream = native_stream(channel, [infer(call, "slow") for call in range(8)], timeout=0.3)
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() is Status.DEADLINE_EXCEEDED
    until(lambda: is_idle(channel, "slow"))
    assert counters(channel, "slow").batches < before.batches + 8, "what is late is never run"


# Cancelling


# Runs in whose time something happens, in turns: the second where the first was over before, as on
# a busy machine.
IN_TIME = (LONG, 20 * LONG)


def test_a_cancelled_call_is_answered_and_the_stream_goes_on(channel: grpc.Channel) -> None:
    def reasons_of_the_cancelled(turns: int) -> list[int]:
        before = counters(channel, "slow").requests_ok
        sender = Sender()
        stream = native_stream(channel, sender)
        sender.send(infer(1, "slow", turns=turns), infer(2, "slow", turns=turns))
        until(lambda: has_begun(channel, queued=1, requests_ok=before + 1))
        sender.send(cancel(2), cancel(1), cancel(1), cancel(99), infer(3))
        answers = {each.infer.call: each.infer for each in (next(stream) for _ in range(3))}
        assert answers[1].final
        assert not answers[3].status.reason
        sender.end()
        assert list(stream) == [], "no call is answered twice"
        return [answers[call].status.reason for call in (1, 2)]

    expected = [pb.REASON_CANCELLED] * 2
    assert any(reasons_of_the_cancelled(turns) == expected for turns in IN_TIME)


def has_begun(channel: grpc.Channel, *, queued: int, requests_ok: int) -> bool:
    """Whether so many wait for the slow model, or so many have had their answers already."""
    now = counters(channel, "slow")
    return now.queued == queued or now.requests_ok >= requests_ok


@pytest.mark.parametrize("opened", [native_stream, kserve_stream])
def test_a_cancelled_stream_frees_everything_at_once(
    channel: grpc.Channel, opened: Callable[..., Any]
) -> None:
    def cancelled_and_waited_for(turns: int) -> tuple[int, int]:
        """How many requests were cancelled, and how many runs ended before that."""
        ok = counters(channel, "slow").requests_ok + 1
        sender = Sender()
        stream = opened(channel, sender)
        for call in range(IN_FLIGHT_MAX):
            if opened is native_stream:
                sender.send(infer(call, "slow", turns=turns))
            else:
                sender.send(kserve_infer(str(call), "slow", turns=turns))
        until(lambda: has_begun(channel, queued=IN_FLIGHT_MAX - 1, requests_ok=ok))
        before = counters(channel, "slow")
        stream.cancel()
        until(lambda: is_idle(channel, "slow"))
        after = counters(channel, "slow")
        cancelled = after.requests_cancelled - before.requests_cancelled
        return cancelled, after.batches - before.batches

    assert any(cancelled_and_waited_for(turns) == (IN_FLIGHT_MAX, 0) for turns in IN_TIME)


VANISHING_CLIENT = """
import sys, time
sys.path.insert(0, sys.argv[2])
import grpc
from test_streams import infer, native_stream
with grpc.insecure_channel(sys.argv[1]) as channel:
    messages = (infer(call, "slow") if call < 8 else time.sleep(600) for call in range(9))
    next(native_stream(channel, messages))
"""


def test_a_client_that_dies_leaves_nothing(server: RunningServer, channel: grpc.Channel) -> None:
    command = [sys.executable, "-c", VANISHING_CLIENT, server.url, str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    client = subprocess.Popen(command, env=environment)
    until(lambda: counters(channel, "slow").queued >= 3)
    client.kill()
    client.wait()
    until(lambda: is_idle(channel, "slow"))


# Backpressure

REQUESTS = 150
FRONT_GROWTH_MAX = 64 * MIB  # 8 results in flight, and what gRPC keeps on the way


def resident(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def settled_count(channel: grpc.Channel) -> int:
    """How many requests were answered when no further one is."""
    count = -1
    while count != (count := counters(channel, "zeros").requests_ok):
        time.sleep(0.3)
    return count


@pytest.mark.parametrize("opened", [native_stream, kserve_stream])
def test_a_peer_that_does_not_read_does_not_grow_the_server(
    server: RunningServer, channel: grpc.Channel, opened: Callable[..., Any]
) -> None:
    """150 results of 1 MiB; the server computes no more of them than it may hold."""
    warm_up = list(native_stream(channel, [infer(call, "zeros") for call in range(16)]))
    assert len(warm_up) == 16
    before, done_before = resident(server.pid), settled_count(channel)
    is_native = opened is native_stream
    messages = [
        infer(call, "zeros") if is_native else kserve_infer(str(call), "zeros")
        for call in range(REQUESTS)
    ]
    with server.channel() as own:
        stream = opened(own, messages)
        until(lambda: counters(channel, "zeros").requests_ok > done_before)
        done = settled_count(channel) - done_before
        assert done < REQUESTS / 2
        assert resident(server.pid) - before < FRONT_GROWTH_MAX
        sizes = [_result_bytes(message) for message in stream]
    assert sizes == [MIB] * REQUESTS


def _result_bytes(message: Any) -> int:
    if isinstance(message, pb.InferStreamResponse):
        return len(message.infer.outputs[0].raw)
    return len(message.infer_response.raw_output_contents[0])


def test_cancels_of_answers_that_wait_for_their_reader(
    server: RunningServer, channel: grpc.Channel
) -> None:
    """Whether an answer was complete when its cancel came or not: each call has exactly one."""
    sender = Sender()
    calls = range(IN_FLIGHT_MAX - 1)  # room for cancels: at the bound nothing is read
    done_before = counters(channel, "zeros").requests_ok
    with server.channel() as own:
        stream = native_stream(own, sender)
        sender.send(*(infer(call, "zeros") for call in calls))
        until(lambda: counters(channel, "zeros").requests_ok == done_before + len(calls))
        sender.send(*(cancel(call) for call in calls))
        time.sleep(0.3)  # let them arrive
        sender.end()
        answers = [each.infer for each in stream]
    assert sorted(each.call for each in answers) == list(calls)
    for answer in answers:
        assert answer.status.reason in (0, pb.REASON_CANCELLED)


# The server's end


@pytest.mark.parametrize(
    "opened", [native_stream, pytest.param(kserve_stream, marks=pytest.mark.slow)]
)
def test_a_stop_finishes_what_was_read_and_says_why(
    repository: Path, start_server: StartServer, opened: Callable[..., Any]
) -> None:
    server = start_server(repository)
    with server.channel() as channel:
        sender = Sender()
        stream = opened(channel, sender)
        is_native = opened is native_stream
        sender.send(infer(1, "slow") if is_native else kserve_infer("1", "slow"))
        until(lambda: not is_idle(channel, "slow") or counters(channel, "slow").requests_ok == 1)
        server.process.send_signal(signal.SIGTERM)
        answer = next(stream)
        assert answer.infer.final if is_native else answer.infer_response.id == "1"
        code, text = failure(stream)
        assert code is Status.UNAVAILABLE
        assert "shutting down" in text
        sender.end()
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log_text()
