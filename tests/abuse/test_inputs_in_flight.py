# SPDX-License-Identifier: Apache-2.0
"""Inputs that change while the server reads them: only their own result is spoiled."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np

from support.anchored import Anchored
from support.killable import until
from support.lane_peer import PACKET_BYTES_MAX, Request, Response, X, by_ref, infer
from support.raw_memory import MIB, input_memory, punch_hole, whole
from support.scribbling import FILLING, scribbled
from thirdrail.tensors import Array, tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2

LARGE = np.arange(1 << 18, dtype=np.float32) + 1  # 1 MiB without a zero
CALLS = 60
CALLS_MAX = 5000  # until each kind was seen


@contextlib.contextmanager
def all_the_time(spoil: Callable[[], None]) -> Iterator[None]:
    """On a thread, until the end."""
    stopping, turns = threading.Event(), []

    def run() -> None:
        while not stopping.is_set():
            spoil()
            turns.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
    assert turns


def test_holes_are_punched_into_inputs_in_flight(anchored: Anchored) -> None:
    """Where there is a hole the server reads zeros, and nothing else."""
    peer = anchored.attach()
    chunk, fd = input_memory(peer)
    seen_whole = seen_holes = 0

    def spoil() -> None:
        os.pwrite(fd, LARGE.tobytes(), 0)
        punch_hole(fd, 0, MIB)

    with all_the_time(spoil):
        for call in range(1, CALLS_MAX):
            response = peer.answer(by_ref(call, whole(chunk), "identity"))
            result = peer.read(response.outputs[0].ref)
            assert (np.equal(result, LARGE) | np.equal(result, 0)).all()
            seen_whole += bool((result == LARGE).any())
            seen_holes += bool((result == 0).any())
            peer.release(response.outputs[0].ref)
            if call >= CALLS and seen_whole and seen_holes:
                break
    assert seen_whole
    assert seen_holes
    os.close(fd)


def test_inputs_scribbled_in_flight_spoil_only_their_own_result(anchored: Anchored) -> None:
    """Each element is one of the two that lay there; the tensor of a batch mate is as it was."""
    peer, mate = anchored.attach(), anchored.attach()
    first = np.full((4, 1 << 14), 3.0, np.float32)
    second = np.full((4, 1 << 14), 1e30, np.float32)
    size = 8 * first.nbytes
    chunk, fd = input_memory(peer, size)
    other = mate.place(mate.grow(first.nbytes), LARGE[: first.size])
    with scribbled(fd, chunk.size, {"a": (first, second)}) as spoiled:
        ref = tensor_pb2.ArenaRef(
            epoch=chunk.epoch, chunk=chunk.chunk, offset=spoiled.places["a"], size=first.nbytes
        )
        for call in range(1, CALLS):
            peer.send(add_itself(call, ref))
            mates = mate.answer(add_itself(call, other)).outputs[0].ref
            expected = 2 * LARGE[: first.size]
            assert np.array_equal(mate.read(mates), expected)
            mate.release(mates)
            while (answer := peer.receive()).WhichOneof("message") != "infer":
                pass
            assert not answer.infer.status.reason, answer
            result = answer.infer.outputs[0].ref
            possible = np.array([6.0, 2e30, np.float32(3.0) + np.float32(1e30)], np.float32)
            assert np.isin(peer.read(result), possible).all()
            peer.release(result)
        until(lambda: spoiled.rounds() > 1)
    os.close(fd)


def add_itself(call: int, ref: tensor_pb2.ArenaRef) -> Request:
    """Half of the largest batch."""
    tensors = []
    for name in "ab":
        tensor = tensor_pb2.Tensor(
            name=name, data_type=tensor_pb2.DATA_TYPE_FP32, shape=[4, 1 << 14]
        )
        tensor.ref.CopyFrom(ref)
        tensors.append(tensor)
    return infer(call, "batched", inputs=tensors)


def test_indices_scribbled_in_flight_reach_no_other_memory(anchored: Anchored) -> None:
    """They are checked on a copy, if at all by the engine: an error, or values of the table."""
    peer = anchored.attach()
    good = np.tile(np.arange(4, dtype=np.int64), 1 << 12)
    bad = np.full(1 << 14, 1 << 40, np.int64)
    chunk, fd = input_memory(peer, 8 * good.nbytes)
    reasons = set()
    with scribbled(fd, chunk.size, {"index": (good, bad)}) as spoiled:
        tensor = tensor_pb2.Tensor(
            name="index", data_type=tensor_pb2.DATA_TYPE_INT64, shape=good.shape
        )
        tensor.ref.epoch, tensor.ref.chunk = chunk.epoch, chunk.chunk
        tensor.ref.offset, tensor.ref.size = spoiled.places["index"], good.nbytes
        for call in range(1, CALLS):
            answer = peer.answer(infer(call, "gather", inputs=[tensor]))
            reasons.add(answer.status.reason)
            if not answer.status.reason:
                assert set(peer.read(answer.outputs[0].ref)) <= {10.0, 11.0, 12.0, 13.0}
                peer.release(answer.outputs[0].ref)
        until(lambda: spoiled.rounds() > 1)
    assert reasons <= {0, pb.REASON_INVALID_ARGUMENT}
    os.close(fd)


def texts_of(length: int, letter: bytes) -> Array:
    """Elements of BYTES as they lie in memory."""
    element = length.to_bytes(4, "little") + letter * 4
    return np.frombuffer(element * 4096, np.uint8)


def test_lengths_scribbled_in_flight_reach_no_other_memory(anchored: Anchored) -> None:
    """A text is read from a copy: as it was at one moment, or refused."""
    peer = anchored.attach()
    good, bad = texts_of(4, b"g"), texts_of(0xFFFFFF, b"b")
    chunk, fd = input_memory(peer, 16 * good.nbytes)
    with scribbled(fd, chunk.size, {"x": (good, bad)}) as spoiled:
        tensor = tensor_pb2.Tensor(name="x", data_type=tensor_pb2.DATA_TYPE_BYTES, shape=[4096])
        tensor.ref.epoch, tensor.ref.chunk = chunk.epoch, chunk.chunk
        tensor.ref.offset, tensor.ref.size = spoiled.places["x"], good.nbytes
        for call in range(1, CALLS):
            answer = peer.answer(infer(call, "identity_bytes", inputs=[tensor]))
            if answer.status.reason:
                assert answer.status.reason == pb.REASON_INVALID_ARGUMENT, answer
                continue
            ref = answer.outputs[0].ref
            data = peer.chunks[ref.epoch, ref.chunk][ref.offset : ref.offset + ref.size]
            assert FILLING not in data
            assert len(data) == good.nbytes
            peer.release(ref)
        until(lambda: spoiled.rounds() > 1)
    os.close(fd)


def test_inputs_that_overlap_are_read_as_they_lie(anchored: Anchored) -> None:
    """In one request, and in many at a time."""
    peer = anchored.attach()
    chunk = peer.grow(MIB)
    ref = peer.place(chunk, LARGE)
    half = ref.size // 2
    calls = range(1, 20)
    for call in calls:
        tensors = []
        for name, offset in (("a", 0), ("b", 64 * call)):
            tensor = tensor_pb2.Tensor(
                name=name, data_type=tensor_pb2.DATA_TYPE_FP32, shape=[half // 16, 4]
            )
            tensor.ref.CopyFrom(ref)
            tensor.ref.offset, tensor.ref.size = offset, half
            tensors.append(tensor)
        peer.send(infer(call, "add", inputs=tensors))
    answered = 0
    while answered < len(calls):
        response = peer.receive()
        if response.WhichOneof("message") == "chunk":
            continue
        shift = 16 * response.infer.call
        expected = LARGE[: half // 4] + LARGE[shift : shift + half // 4]
        assert np.array_equal(peer.read(response.infer.outputs[0].ref), expected)
        answered += 1


def test_memory_that_is_asked_for_and_not_taken(anchored: Anchored) -> None:
    """The worker's descriptor is closed once it was sent, read or not."""
    peer = anchored.attach()
    for _ in range(20):
        peer.send(Request(grow=lane_pb2.GrowRequest(size=4096, alone=True)))
        packet = peer.sock.recv(PACKET_BYTES_MAX)  # without room for the descriptor
        assert Response.FromString(packet).WhichOneof("message") == "chunk"
    assert not peer.answer(infer(1, inputs=[tensor_of_array("x", X)])).status.reason
