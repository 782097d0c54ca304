# SPDX-License-Identifier: Apache-2.0
"""The blocking client against a real gRPC server that echoes."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from pathlib import Path

import grpc
import numpy as np
import pytest

from support.echo import EchoServer, start
from thirdrail import Client, NotNow, Unreachable, errors
from thirdrail.channels import Compression
from thirdrail.failures import START_A_SERVER, error_of_call
from thirdrail.v1 import inference_pb2 as pb

X = {"x": np.array([[1, 2]], np.float32)}
COMPRESSIONS: tuple[Compression | None, ...] = (None, "gzip")


def until(condition: Callable[[], object]) -> None:
    """Waits for something that another thread does; the test's own timeout ends it."""
    while not condition():
        time.sleep(0.005)


def test_infer(client: Client) -> None:
    result = client.infer("echo", X, request_id="r1", version=4, parameters={"p": 0.5})
    np.testing.assert_array_equal(result["x"], X["x"], strict=True)
    assert (result.model_name, result.model_version, result.request_id) == ("echo", 4, "r1")
    assert result.timing.compute_ns == 5
    assert result.parameters == {"p": 0.5}


def test_plain_values_ask_for_the_declaration_once(client: Client, echo: EchoServer) -> None:
    for _ in range(3):
        np.testing.assert_array_equal(client.infer("echo", [[1, 2]])["x"], X["x"], strict=True)
    assert echo.described == 1


def test_large_messages_pass_and_gzip_too(echo: EchoServer) -> None:
    array = np.zeros(6 << 20, np.uint8)  # above gRPC's default limit of 4 MiB
    for compression in COMPRESSIONS:
        with Client(echo.url, compression=compression) as client:
            assert client.infer("echo", {"x": array})["x"].nbytes == array.nbytes
    with pytest.raises(errors.InvalidArgument, match="unknown compression 'lz4'"):
        Client(echo.url, compression="lz4")  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", [n for n in pb.Reason.keys() if pb.Reason.Value(n)])  # noqa: SIM118
def test_every_reason_is_its_own_exception(client: Client, reason: str) -> None:
    wanted = type(errors.error_of_reason(pb.Reason.Value(reason), ""))
    with pytest.raises(errors.ThirdrailError) as raised:
        client.infer("fails", X, parameters={"reason": reason})
    assert type(raised.value) is wanted  # also where two reasons share a gRPC status
    assert str(raised.value) == f"it failed with {reason}"
    assert raised.value.__cause__ is None  # gRPC's own error is no news


def test_an_error_says_what_to_do(client: Client) -> None:
    with pytest.raises(errors.QueueFull) as raised:
        client.infer("fails", X, parameters={"reason": "REASON_QUEUE_FULL"})
    assert "fewer requests" in raised.value.__notes__[0]


def test_a_timeout(client: Client) -> None:
    with pytest.raises(errors.TimedOut, match=r"no answer within 0\.05 s"):
        client.infer("held", X, timeout=0.05)


def test_nobody_there(tmp_path: Path) -> None:
    with Client(f"unix:{tmp_path}/nobody.sock") as client:
        with pytest.raises(
            Unreachable, match=r"no server answers at unix:.*nobody\.sock"
        ) as raised:
            client.infer("echo", X)
        assert raised.value.__notes__ == [START_A_SERVER]
        assert isinstance(raised.value, NotNow)
        with pytest.raises(errors.TimedOut, match=r"not ready within 0\.2 s: no server answers"):
            client.wait_ready(0.2)


def test_another_program_at_that_address(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{tmp_path}/other.sock")
    server.start()
    with Client(f"unix:{tmp_path}/other.sock") as client:
        with pytest.raises(errors.Unimplemented) as raised:
            client.infer("echo", X)
        assert "another program" in raised.value.__notes__[0]
    server.stop(None).wait()


def test_futures(client: Client) -> None:
    futures = [client.submit("echo", {"x": np.full(3, n)}) for n in range(20)]
    assert [future.result()["x"][0] for future in futures] == list(range(20))
    failed = client.submit("fails", X, parameters={"reason": "REASON_NOT_FOUND"})
    assert isinstance(failed.exception(), errors.NotFound)


def test_cancelling_a_future_cancels_the_request(client: Client, echo: EchoServer) -> None:
    future = client.submit("held", X, request_id="gone")
    until(lambda: echo.requests)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    until(lambda: echo.cancelled == ["gone"])


def test_threads_share_one_client(client: Client) -> None:
    def call(number: int) -> bool:
        sent = np.full((4, 5), number, np.int32)
        return bool((client.infer("echo", {"x": sent})["x"] == sent).all())

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(call, range(200)))


def test_threads_that_start_together_open_one_channel(echo: EchoServer) -> None:
    client, barrier = Client(echo.url), threading.Barrier(8)

    def connect(_: int) -> int:
        barrier.wait()
        return id(client._connected())

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(connect, range(8)))) == 1
    client.close()


def test_several_clients_in_one_process(echo: EchoServer, tmp_path: Path) -> None:
    other = EchoServer(tmp_path / "other.sock")
    server = start(other)
    with Client(echo.url) as one, Client(other.url) as two, Client(other.url) as three:
        for client in (one, two, three, one):
            client.infer("echo", X)
    assert (len(echo.requests), len(other.requests)) == (2, 2)
    server.stop(None).wait()


def test_models(client: Client) -> None:
    [status] = client.models()
    assert (status.name, status.version, status.state, status.is_ready) == (
        "echo",
        1,
        "ready",
        True,
    )
    found = client.describe("echo")
    assert [(s.name, s.dtype.name, s.shape) for s in found.inputs] == [("x", "FP32", (-1, 2))]
    with pytest.raises(errors.NotFound, match="unknown model 'nowhere'"):
        client.infer("nowhere", [1])


def test_loading_reports_its_progress(client: Client) -> None:
    seen: list[tuple[str, int, int]] = []
    versions = client.load("echo", progress=lambda at: seen.append((at.phase, at.step, at.steps)))
    assert versions == [1, 3]
    assert seen == [("reading", 1, 2), ("ready", 2, 2)]


def test_after_a_load_a_model_is_asked_anew(client: Client, echo: EchoServer) -> None:
    for described in (1, 2):
        client.infer("echo", [[1, 2]])
        client.infer("echo", [[1, 2]])
        assert echo.described == described
        client.load("echo")


def test_watching_ends_when_the_caller_stops(client: Client, echo: EchoServer) -> None:
    changes = client.watch()
    assert [next(changes).initial, next(changes).initial] == [True, False]
    changes.close()  # type: ignore[attr-defined]
    until(lambda: echo.cancelled == ["watch"])


def test_health_and_waiting_for_it(client: Client, echo: EchoServer) -> None:
    assert client.health() is True
    echo.serving = False
    assert client.health("echo") is False
    with pytest.raises(errors.NotFound):
        client.health("nowhere")
    with pytest.raises(errors.TimedOut, match="not serving"):
        client.wait_ready(0.1)
    threading.Timer(0.1, setattr, (echo, "serving", True)).start()
    client.wait_ready()


def test_waiting_for_a_server_that_is_yet_to_start(tmp_path: Path) -> None:
    echo = EchoServer(tmp_path / "late.sock")
    with Client(echo.url) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait_ready, 30)
        assert not wait([waiting], timeout=0.2).done
        server = start(echo)
        waiting.result()
    server.stop(None).wait()


def test_metrics(client: Client) -> None:
    assert client.metrics() == "thirdrail_up 1\n"
    assert client.snapshot().uptime_ns == 1


def test_closing(echo: EchoServer) -> None:
    client = Client(echo.url)
    assert repr(client) == f"<Client {echo.url} not connected>"
    client.infer("echo", X)
    assert repr(client) == f"<Client {echo.url} open>"
    held = client.submit("held", X)
    client.close()
    client.close()
    assert repr(client) == f"<Client {echo.url} closed>"
    assert isinstance(held.exception(), errors.Cancelled)
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        client.infer("echo", X)


def test_a_server_that_restarts_is_found_again(tmp_path: Path) -> None:
    echo = EchoServer(tmp_path / "again.sock")
    server = start(echo)
    with Client(echo.url) as client:
        client.infer("echo", X)
        server.stop(None).wait()
        with pytest.raises(Unreachable):
            client.infer("echo", X)
        server = start(echo)
        client.wait_ready(30)
        client.infer("echo", X)
    server.stop(None).wait()


def test_a_refused_stream_is_no_server_that_is_away() -> None:
    details = "Stream removed (RST_STREAM (Received RST_STREAM with error code 7))"
    error = error_of_call(grpc.StatusCode.UNAVAILABLE, details, (), address="here", timeout=None)
    assert isinstance(error, errors.ResourceExhausted)
    assert "use a stream" in error.__notes__[0]
