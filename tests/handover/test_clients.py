# SPDX-License-Identifier: Apache-2.0
"""Handing tensors from client to client: what users write, against a real server."""

import asyncio
import gc
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thirdrail
from support.server import RunningServer
from thirdrail.aio import AsyncClient
from thirdrail.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from thirdrail.lane.exports import SharedTensor, text_of_token, token_of_text
from thirdrail.v1 import sessions_pb2, sessions_pb2_grpc

X = np.arange(6 * 4096, dtype=np.float32)  # whole pages, and never inline
SETTLE_S_MAX = 30

NewClient = Callable[..., thirdrail.Client]


@pytest.fixture
def new_client(server: RunningServer) -> Iterator[NewClient]:
    """Clients on the lane. After the test no more is shared than before."""
    before = shared(server)
    clients: list[thirdrail.Client] = []

    def make(**options: Any) -> thirdrail.Client:
        clients.append(thirdrail.Client(server.url, **{"transport": "lane"} | options))
        return clients[-1]

    yield make
    gc.collect()  # arrays that a failed assertion or a caught error still has
    for client in clients:
        client.close()
    settle(lambda: no_more_than(before, server), server)


def shared(server: RunningServer) -> tuple[int, int, int]:
    """Exports, imports and bytes of all sessions."""
    with server.channel() as channel:
        stub = sessions_pb2_grpc.SessionsStub(channel)
        sessions = stub.ListSessions(sessions_pb2.ListSessionsRequest()).sessions
    return (
        sum(each.exports for each in sessions),
        sum(each.imports for each in sessions),
        sum(each.shared_bytes for each in sessions),
    )


def no_more_than(before: tuple[int, int, int], server: RunningServer) -> bool:
    """Less will do: clients of earlier tests may have let go meanwhile."""
    return all(now <= then for now, then in zip(shared(server), before, strict=True))


def settle(holds: Callable[[], bool], server: RunningServer) -> None:
    ends_s = time.monotonic() + SETTLE_S_MAX
    while not holds():
        assert time.monotonic() < ends_s, shared(server)
        time.sleep(0.02)


def filled(
    client: thirdrail.Client, array: np.ndarray[Any, Any] = X, *, is_shared: bool = True
) -> np.ndarray[Any, Any]:
    made = client.empty(array.shape, array.dtype, shared=is_shared)
    made[:] = array
    return made


def test_a_shared_array_is_handed_over_without_a_copy(new_client: NewClient) -> None:
    camera, detector = new_client(), new_client()
    page = filled(camera, X.reshape(6, 4096))
    export = camera.export(page)
    assert export.copies == 0
    assert export.token.startswith("tr1_")
    received = detector.receive(export.token)
    assert (received.shape, received.dtype, received.nbytes) == ((6, 4096), X.dtype, X.nbytes)
    assert np.array_equal(received.array, X.reshape(6, 4096))
    with pytest.raises(ValueError, match="read-only"):
        received.array[0, 0] = 1


def test_what_is_exported_where_it_lies_cannot_be_written_any_more(new_client: NewClient) -> None:
    camera = new_client()
    page = filled(camera)
    camera.export(page)
    with pytest.raises(ValueError, match="read-only"):
        page[0] = 1


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda client: filled(client), 0),
        (lambda client: filled(client).reshape(4, -1), 0),
        (lambda client: filled(client, X[:5000]), 0),
        (lambda client: filled(client)[4096:], 1),
        (lambda client: filled(client)[:-8], 1),  # ends in the last page of the whole
        (lambda client: filled(client, X[:0]), 1),
        (lambda client: filled(client).reshape(6, 4096).T, 1),
        (lambda client: X.copy(), 1),
        (lambda client: X.astype(">f4"), 1),
        (lambda client: client.infer("identity_fp32", X, borrow=True)["y"], 1),
        (lambda client: client.infer("identity_fp32", X, borrow=True)["y"][4096:], 1),
        (lambda client: client.infer("identity_fp32", X)["y"], 1),
        (lambda client: filled(client, is_shared=False), 1),
        (lambda client: filled(client, is_shared=False)[4096:], 1),
        (lambda client: np.float32(3), 1),
        (lambda client: np.zeros((0, 3), np.int64), 1),
        (lambda client: memoryview(X.data), 1),
    ],
)
def test_any_array_can_be_exported(new_client: NewClient, make: Any, copies: int) -> None:
    camera, detector = new_client(), new_client()
    value = make(camera)
    expected = np.array(value)
    export = camera.export(value)
    assert export.copies == copies
    received = detector.receive(export.token)
    assert received.shape == expected.shape
    assert received.dtype == expected.dtype.newbyteorder("=")
    assert np.array_equal(received.array, expected)


def test_a_received_tensor_is_an_input_without_a_copy(new_client: NewClient) -> None:
    camera, detector = new_client(), new_client()
    received = detector.receive(camera.export(filled(camera)).token)
    bytes_before = detector_bytes(detector)
    for value in (received, received.array, received.array[4096:], np.asarray(received)):
        assert np.array_equal(detector.infer("identity_fp32", value)["y"], np.asarray(value))
    assert detector_bytes(detector) == bytes_before  # no input memory was needed


def detector_bytes(client: thirdrail.Client) -> int:
    lane = client._connected().access.lane()
    assert lane is not None
    return lane.talk.memory.input_bytes_used


def test_a_received_tensor_is_handed_on_without_a_copy(new_client: NewClient) -> None:
    camera, detector, reader = new_client(), new_client(), new_client()
    first = detector.receive(camera.export(filled(camera)).token)
    export = detector.export(first)
    assert export.copies == 0
    second = reader.receive(export.token)
    camera.close()
    first.release()
    assert np.array_equal(second.array, X)


def test_other_libraries_read_it(new_client: NewClient) -> None:
    camera, detector = new_client(), new_client()
    received = detector.receive(camera.export(filled(camera)).token)
    assert np.asarray(received, dtype=np.float64).dtype == np.float64
    assert received.__dlpack_device__()[0] == 1  # the CPU
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":  # before, read-only arrays had no DLPack
        assert np.array_equal(np.from_dlpack(received), X)


def test_a_revoke_is_seen_by_who_has_the_tensor(new_client: NewClient) -> None:
    camera, detector = new_client(), new_client()
    export = camera.export(filled(camera))
    received = detector.receive(export.token)
    view = received.array
    export.revoke()
    export.revoke()
    with pytest.raises(FailedPrecondition, match="revoked by the one who exported"):
        _ = received.array
    with pytest.raises(FailedPrecondition, match="revoked by the one who exported"):
        detector.infer("identity_fp32", received)
    with pytest.raises(FailedPrecondition, match="revoked by the one who exported"):
        detector.infer("identity_fp32", view)
    assert np.array_equal(view, X)  # what is mapped stays as it is
    assert received.is_revoked
    assert "revoked" in repr(received)


def test_a_released_tensor_is_gone_and_its_views_stay(new_client: NewClient) -> None:
    camera, detector = new_client(), new_client()
    with detector.receive(camera.export(filled(camera)).token) as received:
        view = received.array
    with pytest.raises(FailedPrecondition, match="was released"):
        _ = received.array
    received.release()
    assert np.array_equal(view, X)
    assert np.array_equal(detector.infer("identity_fp32", view)["y"], X)  # copied, as any array


def test_it_goes_with_its_last_view(new_client: NewClient, server: RunningServer) -> None:
    camera, detector = new_client(), new_client()
    received = detector.receive(camera.export(X).token)
    row = received.array[:4096]
    del received
    gc.collect()
    assert row[1] == 1
    assert shared(server)[1] == 1
    del row
    gc.collect()
    detector.infer("identity_fp32", X[:4])  # with the next packet
    settle(lambda: shared(server) == (0, 0, 0), server)


@pytest.mark.parametrize(
    "text", ["", "tr1_", "tr1_AAAA", "tr2_" + "A" * 22, "x" * 26, "tr1_" + "?" * 22, None, 7]
)
def test_what_is_no_token_is_named_so(new_client: NewClient, text: Any) -> None:
    with pytest.raises(InvalidArgument, match="not the token of an export") as failure:
        new_client().receive(text)
    assert "A" * 22 not in str(failure.value)  # it is a secret


def test_a_token_is_text_and_back() -> None:
    for token in (bytes(16), b"\xff" * 16, os.urandom(16)):
        text = text_of_token(token)
        assert token_of_text(text) == token
        assert text.replace("-", "").replace("_", "").isalnum()
        assert len(text) == 26


def test_a_token_is_good_once(new_client: NewClient) -> None:
    camera, detector = new_client(), new_client()
    token = camera.export(X).token
    detector.receive(token)
    with pytest.raises(FailedPrecondition, match="used before"):
        detector.receive(token)
    assert token not in repr(camera.export(X))


def test_a_tensor_for_another_user_is_refused(new_client: NewClient) -> None:
    camera, detector = new_client(), new_client()
    token = camera.export(X, uid=os.geteuid() + 1).token
    with pytest.raises(PermissionDenied, match="for uid"):
        detector.receive(token)


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        ([1, 2], {}, "only arrays can be exported, got list"),
        (np.array([b"a"], object), {}, "strings cannot be exported"),
        (np.array(["a"]), {}, "strings cannot be exported"),
        (X, {"lifetime": 0}, "lifetime must be a number of seconds above 0, got 0"),
        (X, {"lifetime": float("nan")}, "got nan"),
        (X, {"uid": -1}, "uid must be a user id from 0"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    new_client: NewClient, value: Any, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidArgument, match=text):
        new_client().export(value, **options)


def test_without_the_lane_the_reason_is_given(new_client: NewClient) -> None:
    client = new_client(transport="grpc")
    expected = "sharing tensors needs the lane, calls go over grpc-unix: .*transport='grpc'"
    with pytest.raises(FailedPrecondition, match=expected):
        client.export(X)
    with pytest.raises(FailedPrecondition, match=expected):
        client.receive(text_of_token(bytes(16)))


def test_a_revoke_after_the_session_says_what_has_become_of_it(new_client: NewClient) -> None:
    camera = new_client()
    export = camera.export(X)
    camera.close()
    with pytest.raises(FailedPrecondition, match="who had received the tensor keeps it"):
        export.revoke()


def test_threads_export_and_receive_at_once(new_client: NewClient) -> None:
    from concurrent.futures import ThreadPoolExecutor

    camera, detector = new_client(), new_client()

    def hand_over(number: int) -> bool:
        array = X + number
        with detector.receive(camera.export(array).token) as received:
            same = np.array_equal(detector.infer("identity_fp32", received)["y"], array)
            return same and np.array_equal(received.array, array)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(hand_over, range(64)))


# asyncio

AsyncBody = Callable[[AsyncClient, AsyncClient], Coroutine[Any, Any, None]]


@pytest.fixture
def run_async(server: RunningServer) -> Iterator[Callable[[AsyncBody], None]]:
    """Runs a coroutine with two clients; afterwards no more is shared than before."""
    before = shared(server)

    async def with_clients(body: AsyncBody) -> None:
        async with (
            AsyncClient(server.url, transport="lane") as camera,
            AsyncClient(server.url, transport="lane") as detector,
        ):
            await body(camera, detector)

    yield lambda body: asyncio.run(with_clients(body))
    gc.collect()
    settle(lambda: no_more_than(before, server), server)


def test_asyncio_hands_over_too(run_async: Callable[[AsyncBody], None]) -> None:
    async def body(camera: AsyncClient, detector: AsyncClient) -> None:
        page = await camera.empty(X.shape, X.dtype, shared=True)
        page[:] = X
        export = await camera.export(page)
        assert export.copies == 0
        received = await detector.receive(export.token)
        assert isinstance(received, SharedTensor)
        assert np.array_equal(received.array, X)
        result = await detector.infer("identity_fp32", received)
        assert np.array_equal(result["y"], X)
        again = await detector.export(received)
        assert again.copies == 0
        assert np.array_equal((await camera.receive(again.token)).array, X)
        received.release()

    run_async(body)


def test_asyncio_exports_results_and_other_arrays(run_async: Callable[[AsyncBody], None]) -> None:
    async def body(camera: AsyncClient, detector: AsyncClient) -> None:
        large = np.tile(X, 32)
        borrowed = (await camera.infer("identity_fp32", large, borrow=True))["y"]
        for value in (borrowed, large, X[::2]):
            export = await camera.export(value)
            assert export.copies == 1
            assert np.array_equal((await detector.receive(export.token)).array, value)

    run_async(body)


def test_asyncio_hears_of_a_revoke(run_async: Callable[[AsyncBody], None]) -> None:
    async def body(camera: AsyncClient, detector: AsyncClient) -> None:
        export = await camera.export(X)
        received = await detector.receive(export.token)
        await export.revoke()
        while not received.is_revoked:
            await asyncio.sleep(0.001)
        with pytest.raises(FailedPrecondition, match="revoked by the one who exported"):
            await detector.infer("identity_fp32", received)

    run_async(body)


def test_asyncio_gives_back_what_nobody_waits_for(
    run_async: Callable[[AsyncBody], None], server: RunningServer
) -> None:
    async def body(camera: AsyncClient, detector: AsyncClient) -> None:
        for _ in range(20):
            receiving = asyncio.create_task(detector.receive((await camera.export(X)).token))
            await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
        await detector.infer("identity_fp32", X)

    run_async(body)


def test_asyncio_refuses_what_is_refused(run_async: Callable[[AsyncBody], None]) -> None:
    async def body(camera: AsyncClient, detector: AsyncClient) -> None:
        token = (await camera.export(X)).token
        await detector.receive(token)
        with pytest.raises(FailedPrecondition, match="used before"):
            await detector.receive(token)
        with pytest.raises(InvalidArgument, match="only arrays"):
            await camera.export([1.0])
        export = await camera.export(X)
        await camera.close()
        with pytest.raises(FailedPrecondition, match="keeps it"):
            await export.revoke()

    run_async(body)


def test_a_released_tensor_keeps_nothing_mapped(new_client: NewClient) -> None:
    camera, detector = new_client(), new_client()
    received = detector.receive(camera.export(X).token)
    gc.collect()
    before = Path("/proc/self/maps").read_text().count("memfd:thirdrail")
    received.release()
    assert Path("/proc/self/maps").read_text().count("memfd:thirdrail") == before - 1
    assert "released" in repr(received)
