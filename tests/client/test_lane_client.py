# SPDX-License-Identifier: Apache-2.0
"""`Client` on the lane of a real server: attaching, falling back, restarts, forks, streams."""

import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.echo import EchoServer
from support.models import add, identity, write
from support.server import RunningServer, running_server
from thirdrail import Client, Result, Stream, errors

X = {"x": np.ones(4, np.float32)}
LARGE = np.arange(1 << 16, dtype=np.float32)


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.url, transport="lane") as client:
        yield client


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[RunningServer]:
    """A server whose worker a test may kill."""
    repository = tmp_path / "repository"
    write(repository, "identity_fp32", identity())
    write(repository, "plus_one", add(1))
    with running_server(repository, tmp_path / "server") as running:
        yield running


def test_a_local_server_is_reached_over_the_lane(server: RunningServer) -> None:
    for url in (server.url, server.address):
        with Client(url) as client:
            before = client.transport
            assert client.infer("identity_fp32", X).timing.transport == "lane"
            after = client.transport
            assert (before.name, after.name, after.reason) == ("none", "lane", "")
            assert after.address.endswith(".lane")


def test_the_transport_can_be_chosen(server: RunningServer) -> None:
    with Client(server.url, transport="grpc") as client:
        result = client.infer("identity_fp32", X, borrow=True)
        assert result.timing.transport == "grpc"
        assert not result.is_borrowed
        assert client.transport.name == "grpc-unix"
        assert "transport='grpc'" in client.transport.reason
        assert client.empty((3, 4), np.int8).shape == (3, 4)
        with result:
            assert result["y"].shape == (4,)
        with pytest.raises(errors.FailedPrecondition, match="was released"):
            result["y"]
    with pytest.raises(errors.InvalidArgument, match="unknown transport"):
        Client(server.url, transport="pigeon")  # type: ignore[arg-type]


def test_a_finalizer_of_garbage_may_make_calls(server: RunningServer) -> None:
    """The collector clears weak references first, by which a lane's parts have each other."""
    seen: list[Any] = []

    class Service:
        def __init__(self) -> None:
            self.client = Client(server.url, transport="lane")
            self.stream = self.client.stream()
            self.itself = self

        def __del__(self) -> None:
            try:
                array = self.client.empty(LARGE.shape)
                array[:] = LARGE
                for x in (X["x"], array):
                    seen.append(self.client.infer("identity_fp32", {"x": x})["y"].size)
                seen.append(self.client.submit("identity_fp32", X).result(60)["y"].size)
                with self.stream as stream, pytest.raises(errors.Unavailable, match="is garbage"):
                    stream.submit("identity_fp32", X)
                seen.append("all")
            finally:
                self.client.close()

    service = Service()
    assert service.client.infer("identity_fp32", X)["y"].size == 4
    del service
    gc.collect()
    assert seen == [4, LARGE.size, 4, "all"]


def test_a_server_without_a_lane_is_reached_over_grpc(
    echo: EchoServer, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(echo.url) as client, caplog.at_level(logging.INFO, "thirdrail"):
        client.infer("echo", X)
        client.infer("echo", X)
        assert client.transport.name == "grpc-unix"
        assert "older than the lane" in client.transport.reason
    assert len(caplog.records) == 1, "said once, and not in silence"
    with (
        Client(echo.url, transport="lane") as client,
        pytest.raises(errors.FailedPrecondition, match="cannot use the lane"),
    ):
        client.infer("echo", X)


def test_the_three_levels(client: Client) -> None:
    private = client.infer("identity_fp32", LARGE)
    assert not private.is_borrowed
    np.testing.assert_array_equal(private["y"], LARGE)

    x = client.empty(LARGE.shape)
    x[:] = LARGE
    with client.infer("identity_fp32", x, borrow=True) as borrowed:
        assert borrowed.is_borrowed
        np.testing.assert_array_equal(borrowed["y"], LARGE)
        handed_on = client.infer("plus_one", borrowed["y"].reshape(-1, 4), borrow=True)
    np.testing.assert_array_equal(handed_on["c"].ravel(), LARGE + 1)


def test_plain_values_take_the_models_type(client: Client) -> None:
    assert client.infer("identity_int16", [1, 2])["y"].dtype == np.int16
    assert client.submit("identity_bytes", "ü").result()["y"].tolist() == ["ü".encode()]
    with pytest.raises(errors.InvalidArgument, match="does not fit"):
        client.infer("identity_int8", [1000])


def test_every_way_to_call_gives_the_same(client: Client) -> None:
    with client.stream() as stream:
        results = (
            client.infer("identity_fp32", X, request_id="r"),
            client.submit("identity_fp32", X, request_id="r").result(),
            stream.submit("identity_fp32", X, request_id="r").result(),
        )
    for result in results:
        np.testing.assert_array_equal(result["y"], X["x"], strict=True)
        assert (result.model_name, result.model_version, result.request_id) == (
            "identity_fp32",
            1,
            "r",
        )
        assert result.timing.transport == "lane"


# Streams


def test_a_stream_keeps_its_bound_and_waits_at_its_end(client: Client) -> None:
    slow = {"x": np.ones(1, np.float32), "turns": np.array(200)}
    with client.stream(in_flight_max=3) as stream:
        assert isinstance(stream, Stream)
        futures = []
        for number in range(30):
            futures.append(stream.submit("slow", {**slow, "x": np.full(1, number, np.float32)}))
            assert sum(not each.done() for each in futures) <= 3
    assert [int(each.result(0)["y"][0]) for each in futures] == list(range(30))
    assert repr(stream).endswith("closed, 0 in flight>")
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        stream.submit("slow", slow)


def test_a_stream_must_be_entered(client: Client) -> None:
    with pytest.raises(errors.FailedPrecondition, match="with"):
        client.stream().submit("identity_fp32", X)


def test_an_exception_inside_a_stream_cancels_what_is_open(client: Client) -> None:
    long = {"x": np.ones(1, np.float32), "turns": np.array(150_000)}
    stream = client.stream()
    open_ones: list[Future[Result]] = []

    def leave() -> None:
        with stream:
            open_ones.extend(stream.submit("slow", long) for _ in range(4))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        leave()
    for future in open_ones:
        assert isinstance(future.exception(0), errors.Cancelled)


def test_what_cannot_be_sent_takes_no_room_of_a_stream(client: Client) -> None:
    with client.stream(in_flight_max=1) as stream:
        for _ in range(3):
            with pytest.raises(errors.InvalidArgument):
                stream.submit("identity_fp32", {"x": np.zeros(1, np.complex64)})
            with pytest.raises(errors.ResourceExhausted):
                stream.submit("identity_fp32", X, request_id="x" * (1 << 17))
        stream.submit("identity_fp32", X).result()


# Ends


def test_the_next_call_attaches_anew(mortal: RunningServer) -> None:
    with Client(mortal.url) as client:
        kept = client.infer("identity_fp32", LARGE, borrow=True)
        with client.stream() as stream:
            stream.submit("identity_fp32", X).result()
            os.kill(mortal.worker_pid(), signal.SIGKILL)
            failed = client.submit("identity_fp32", X).exception()
            assert failed is None or isinstance(failed, errors.Unavailable)
            deadline = time.monotonic() + 60
            while is_on_lane(client):
                assert time.monotonic() < deadline
                with_error(client)
            with pytest.raises(errors.Unavailable, match="stream has ended, open another one"):
                stream.submit("identity_fp32", X)
        while with_error(client) is not None:
            assert time.monotonic() < deadline
        while not is_on_lane(client):
            assert time.monotonic() < deadline
            with_error(client)
            time.sleep(0.05)
        np.testing.assert_array_equal(kept["y"], LARGE)
        copied = client.infer("identity_fp32", kept["y"])["y"]  # the old session's memory
        np.testing.assert_array_equal(copied, LARGE)


def is_on_lane(client: Client) -> bool:
    return client.transport.name == "lane"


def with_error(client: Client) -> errors.ThirdrailError | None:
    try:
        client.infer("identity_fp32", X)
    except errors.Unavailable as error:
        return error
    return None


def test_a_model_that_is_on_its_way_is_not_unknown(mortal: RunningServer) -> None:
    """A worker that was restarted has no models yet; that they come is what the front knows."""
    with Client(mortal.url, transport="lane") as client:
        client.infer("identity_fp32", X)
        for unknown in ("nobody", "identity_fp32"):
            options: Any = {} if unknown == "nobody" else {"version": 7}
            for ask in (client.infer, lambda *a, **o: client.submit(*a, **o).result()):
                with pytest.raises(errors.NotFound):
                    ask(unknown, X, **options)
        os.kill(mortal.worker_pid(), signal.SIGKILL)
        seen: set[type] = set()
        deadline = time.monotonic() + 60
        while not seen or seen.pop() is not type(None):
            assert time.monotonic() < deadline
            try:
                future = client.submit("identity_fp32", X)
                seen = {type(future.exception())}
            except errors.ThirdrailError as error:
                seen = {type(error)}
            assert all(issubclass(each, (errors.Unavailable, type(None))) for each in seen), seen


def test_a_closed_client_leaves_no_session(mortal: RunningServer) -> None:
    with Client(mortal.url) as watching:
        for _ in range(10):
            with Client(mortal.url) as client:
                client.infer("identity_fp32", LARGE)
            with pytest.raises(errors.FailedPrecondition, match="closed"):
                client.infer("identity_fp32", X)
        assert watching.infer("identity_fp32", X)["y"].shape == (4,)
        deadline = time.monotonic() + 20
        while len(os.listdir(f"/proc/{mortal.worker_pid()}/task")) > 64:
            assert time.monotonic() < deadline


def test_forked_children_attach_by_themselves(server: RunningServer) -> None:
    """Parent and children call at the same time, and nobody reads another one's answers."""
    script = """
        import os, sys
        import numpy as np
        import thirdrail

        client = thirdrail.Client(sys.argv[1], transport="lane")

        def call(number):
            for turn in range(50):
                sent = np.full(4 if turn % 2 else 20_000, number * 1000 + turn, np.float32)
                received = client.infer("identity_fp32", sent, borrow=turn % 3 == 0)
                np.testing.assert_array_equal(received["y"], sent)
            return client._connected().access.lane().session

        before = call(0)
        array = client.empty(20_000)
        array[:] = 5
        future = client.submit("identity_fp32", array)
        pipe, end = os.pipe()
        children = []
        for number in range(1, 4):
            pid = os.fork()
            if not pid:
                mine = call(number)
                inherited = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 64)
                             if os.path.exists(f"/proc/self/fd/{fd}")]
                try:
                    future.result(10)
                except thirdrail.CallerError as error:
                    assert "forked child" in str(error), error
                assert (array == 5).all()
                os.write(end, f"{mine} ".encode())
                os._exit(0)
            children.append(pid)
        assert call(0) == before
        assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in children)
        assert (future.result(30)["y"] == 5).all()
        sessions = {before, *map(int, os.read(pipe, 1000).split())}
        assert len(sessions) == 4, sessions
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), server.url],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_lock_that_a_thread_held_does_not_stop_a_child(server: RunningServer) -> None:
    script = """
        import os, signal, sys, threading
        import numpy as np
        import thirdrail

        client = thirdrail.Client(sys.argv[1], transport="lane")
        x = np.ones(4, np.float32)
        client.infer("identity_fp32", x)
        lane = client._connected().access.lane()
        held, go_on = threading.Event(), threading.Event()

        def hold():
            with lane.talk.lock:
                held.set()
                go_on.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        pid = os.fork()
        if not pid:
            signal.alarm(30)
            client.infer("identity_fp32", x)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        go_on.set()
        thread.join()
        assert status == 0, status
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), server.url],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
