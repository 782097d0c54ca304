# SPDX-License-Identifier: Apache-2.0
"""Who lives and who dies: killed workers, killed fronts, orderly stops, and what is left behind."""

import contextlib
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conftest import StartServer
from support.models import add, identity, slow, write
from support.server import RunningServer, wait_until_settled
from thirdrail.tensors import array_of_tensor, tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import inference_pb2_grpc, metrics_pb2, metrics_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FOR_EVER = 2_000_000_000  # turns of the slow model


@pytest.fixture
def small_repository(tmp_path: Path) -> Path:
    repository = tmp_path / "models"
    write(repository, "identity", identity())
    write(repository, "slow", slow())
    return repository


def infer(channel: grpc.Channel, values: list[float], timeout_s: float = 10) -> list[float]:
    inputs = [tensor_of_array("x", np.array(values, np.float32))]
    request = pb.InferRequest(model_name="identity", inputs=inputs)
    response = inference_pb2_grpc.InferenceStub(channel).Infer(request, timeout=timeout_s)
    return list(array_of_tensor(response.outputs[0]))


def infer_slowly(channel: grpc.Channel, turns: int) -> pb.InferResponse:
    inputs = [
        tensor_of_array("x", np.zeros(1, np.float32)),
        tensor_of_array("turns", np.array(turns, np.int64)),
    ]
    request = pb.InferRequest(model_name="slow", inputs=inputs)
    return inference_pb2_grpc.InferenceStub(channel).Infer(request, timeout=60)


def health(channel: grpc.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status)


def until(condition: object, *, seconds: float = 30) -> None:
    """Wait for a condition given as a callable."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_a_killed_worker_comes_back_and_nothing_else_notices(
    small_repository: Path, start_server: StartServer
) -> None:
    server = start_server(small_repository)
    with server.channel() as channel, ThreadPoolExecutor() as pool:
        assert infer(channel, [1, 2]) == [1, 2]
        watched: list[int] = []
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="identity"))
        pool.submit(_collect, watch, watched)
        until(lambda: watched == [SERVING])
        running = pool.submit(infer_slowly, channel, FOR_EVER)
        until(lambda: channel_has_work(channel))
        first = server.worker_pid()
        os.kill(first, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            running.result()
        assert time.monotonic() - started < 30, "callers are told at once, not at their deadline"
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        until(lambda: watched == [SERVING, NOT_SERVING, SERVING])
        assert infer(channel, [3]) == [3]
        assert server.worker_pid() != first
        assert server.process.poll() is None
        watch.cancel()
    status = _snapshot(server).workers[0]
    assert (status.restarts, status.is_serving) == (1, True)


def test_while_there_is_no_worker_callers_are_told_so_at_once(
    small_repository: Path, start_server: StartServer
) -> None:
    server = start_server(small_repository)
    with server.channel() as channel:
        infer(channel, [1])
        os.kill(server.worker_pid(), signal.SIGSTOP)  # alive, but mute: deadlines still count
        with pytest.raises(grpc.RpcError) as caught:
            infer(channel, [1], timeout_s=0.3)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: is_told_without_a_worker(server, channel))
        until(lambda: health(channel) == SERVING)
        assert infer(channel, [1]) == [1]


def is_told_without_a_worker(server: RunningServer, channel: grpc.Channel) -> bool:
    """Kills the worker. False: the next one was there before anybody asked, on a busy machine."""
    os.kill(server.worker_pid(), signal.SIGKILL)
    until(lambda: health(channel) == NOT_SERVING)
    try:
        infer(channel, [1])
    except grpc.RpcError as error:
        return bool(error.code() == grpc.StatusCode.UNAVAILABLE)
    return False


@pytest.mark.slow
def test_counters_never_go_down_when_the_worker_dies(
    small_repository: Path, start_server: StartServer
) -> None:
    server = start_server(small_repository)
    with server.channel() as channel:
        for _ in range(5):
            infer(channel, [1])
        before = _requests_ok(server)
        assert before == 5
        os.kill(server.worker_pid(), signal.SIGKILL)
        until(lambda: health(channel) == NOT_SERVING)
        assert _requests_ok(server) == 5
        until(lambda: health(channel) == SERVING)
        infer(channel, [1])
        assert _requests_ok(server) == 6


def test_a_killed_front_leaves_nothing_behind(
    small_repository: Path, start_server: StartServer
) -> None:
    server = start_server(small_repository)
    worker = server.worker_pid()
    assert server.socket.exists()
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()
    until(lambda: is_gone(worker))
    assert not server.socket.exists()
    assert _memory_files(worker) == 0


def test_a_front_killed_while_it_starts_leaves_nothing_behind(
    small_repository: Path, start_server: StartServer
) -> None:
    server = start_server(small_repository, wait=False)
    until(lambda: psutil.Process(server.pid).children())
    children = psutil.Process(server.pid).children(recursive=True)
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()
    until(lambda: all(is_gone(child.pid) for child in children))


@pytest.mark.slow
def test_sigterm_finishes_what_was_taken_and_exits_with_zero(
    small_repository: Path, start_server: StartServer
) -> None:
    server = start_server(small_repository)
    worker = server.worker_pid()
    with server.channel() as channel, ThreadPoolExecutor() as pool:
        infer(channel, [1])
        running = pool.submit(infer_slowly, channel, 200_000)
        until(lambda: channel_has_work(channel) or running.done())
        server.process.terminate()
        assert list(running.result().outputs[0].shape) == [1]
        assert server.process.wait(30) == 0
    assert is_gone(worker)
    assert not server.socket.exists()
    assert "Traceback" not in server.log_text()


@pytest.mark.slow
def test_sigterm_to_every_process_finishes_what_was_taken_as_well(
    small_repository: Path, start_server: StartServer
) -> None:
    """As service managers send it, and coreutils' timeout, which sends it twice."""
    server = start_server(small_repository)
    worker = server.worker_pid()
    with server.channel() as channel, ThreadPoolExecutor() as pool:
        infer(channel, [1])
        running = pool.submit(infer_slowly, channel, 200_000)
        until(lambda: channel_has_work(channel) or running.done())
        for pid in (worker, server.pid):
            os.kill(pid, signal.SIGTERM)
        until(lambda: "stopping" in server.log_text())
        os.kill(server.pid, signal.SIGTERM)
        assert list(running.result().outputs[0].shape) == [1]
        assert server.process.wait(30) == 0
    assert is_gone(worker)


@pytest.mark.slow
@pytest.mark.parametrize("is_nohup", [False, True])
def test_the_end_of_a_terminal_is_an_orderly_end_unless_it_is_to_be_ignored(
    small_repository: Path, start_server: StartServer, is_nohup: bool
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_nohup else signal.SIG_DFL)
    try:
        server = start_server(small_repository)
    finally:
        signal.signal(signal.SIGHUP, before)
    for pid in (server.worker_pid(), server.pid):
        os.kill(pid, signal.SIGHUP)
    if is_nohup:
        with server.channel() as channel:
            assert infer(channel, [1]) == [1]
        server.process.terminate()
    assert server.process.wait(30) == 0
    assert "died" not in server.log_text()


@pytest.mark.slow
def test_a_worker_that_stands_still_does_not_hold_up_the_end(
    small_repository: Path, start_server: StartServer
) -> None:
    server = start_server(small_repository, "--shutdown-seconds=600")
    worker = server.worker_pid()
    os.kill(worker, signal.SIGSTOP)
    server.process.terminate()
    assert server.process.wait(60) == 0
    assert "worker 'cpu' said nothing for 5 s: killed" in server.log_text()
    assert "restarting" not in server.log_text()
    assert is_gone(worker)


@pytest.mark.slow
def test_the_second_ctrl_c_ends_at_once(small_repository: Path, start_server: StartServer) -> None:
    server = start_server(small_repository)
    worker = server.worker_pid()
    with server.channel() as channel, ThreadPoolExecutor() as pool:
        running = pool.submit(infer_slowly, channel, FOR_EVER)
        until(lambda: channel_has_work(channel))
        server.process.send_signal(signal.SIGINT)
        until(lambda: "a second signal ends at once" in server.log_text())
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 1
        with pytest.raises(grpc.RpcError):
            running.result()
    until(lambda: is_gone(worker))


def channel_has_work(channel: grpc.Channel) -> bool:
    snapshot = metrics_pb2_grpc.MetricsStub(channel).Snapshot(metrics_pb2.SnapshotRequest())
    return any(model.running for model in snapshot.models)


def test_a_server_is_not_ready_while_it_stops(
    small_repository: Path, start_server: StartServer
) -> None:
    server = start_server(small_repository)
    with server.channel() as channel, ThreadPoolExecutor() as pool:
        seen: list[int] = []
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        pool.submit(_collect, watch, seen)
        until(lambda: seen == [SERVING])
        running = pool.submit(infer_slowly, channel, FOR_EVER)
        until(lambda: channel_has_work(channel))
        server.process.terminate()
        until(lambda: seen == [SERVING, NOT_SERVING])
        assert not running.done(), "readiness goes before the work is finished"
        server.process.kill()
        with pytest.raises(grpc.RpcError):
            running.result()


@pytest.mark.slow
def test_two_servers_do_not_share_a_socket(
    small_repository: Path, start_server: StartServer
) -> None:
    server = start_server(small_repository)
    second = start_server(small_repository, f"--socket={server.socket}", "--no-tcp", wait=False)
    assert second.process.wait(30) == 1
    assert f"another server listens on '{server.socket}'" in " ".join(second.log_text().split())
    with server.channel() as channel:
        assert infer(channel, [1]) == [1]


def test_a_socket_left_by_a_crash_is_taken_over(
    small_repository: Path, start_server: StartServer, tmp_path: Path
) -> None:
    path = tmp_path / "grpc.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = start_server(small_repository, f"--socket={path}", "--no-tcp", wait=False)
    server.socket = path
    wait_until_settled(server)
    assert oct(path.stat().st_mode & 0o777) == "0o600"
    with server.channel() as channel:
        assert infer(channel, [1]) == [1]


@pytest.mark.slow
def test_a_taken_port_is_a_clear_error(small_repository: Path, start_server: StartServer) -> None:
    server = start_server(small_repository)
    second = start_server(small_repository, f"--address={server.address}", wait=False)
    assert second.process.wait(30) == 1
    assert f"cannot listen on {server.address}" in second.log_text()
    assert "Traceback" not in second.log_text()


def test_a_broken_model_does_not_stop_the_others(
    small_repository: Path, start_server: StartServer
) -> None:
    folder = small_repository / "broken" / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"\x08\x09" + os.urandom(2000))
    write(small_repository, "add", add())
    server = start_server(small_repository)
    with server.channel() as channel:
        assert infer(channel, [1]) == [1]
        assert health(channel, "broken") == NOT_SERVING
        assert health(channel) == NOT_SERVING, "strict: ready only when all models are"
    assert "broken" in server.log_text()
    assert "Traceback" not in server.log_text()


def _collect(watch: object, seen: list[int]) -> None:
    with contextlib.suppress(grpc.RpcError):
        for response in watch:  # type: ignore[attr-defined]
            seen.append(int(response.status))


def _snapshot(server: RunningServer) -> metrics_pb2.SnapshotResponse:
    with server.channel() as channel:
        return metrics_pb2_grpc.MetricsStub(channel).Snapshot(
            metrics_pb2.SnapshotRequest(), timeout=10
        )


def _requests_ok(server: RunningServer) -> int:
    models = {model.name: model for model in _snapshot(server).models}
    return models["identity"].requests_ok


def _memory_files(pid: int) -> int:
    """Processes other than this one that still map or hold the lane's memory of `pid`."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return sum("memfd:thirdrail" in m.path for m in psutil.Process(pid).memory_maps())
    return 0
