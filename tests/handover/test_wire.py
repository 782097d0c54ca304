# SPDX-License-Identifier: Apache-2.0
"""Handing tensors over through a real worker, packet by packet."""

import fcntl
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.handover_peer import HandOverPeer, Ref, ref_to
from support.lane_peer import Request, by_ref, infer
from support.worker import RunningWorker, running_worker
from thirdrail.tensors import tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.config import ExportLimits, WorkerConfig

PAGE = mmap.PAGESIZE
PICTURE = np.arange(3 * 5 * PAGE, dtype=np.float32).reshape(3, 5, PAGE)  # 240 KiB
SMALL = np.arange(8, dtype=np.float32)
LANES = 256
SETTLE_S_MAX = 30

NewPeer = Callable[[], HandOverPeer]


@pytest.fixture(scope="module")
def worker(standard_repository: Path) -> Iterator[RunningWorker]:
    config = WorkerConfig(exports=ExportLimits(exports_per_session_max=6))
    with running_worker(config, lanes=LANES) as running:
        running.load(standard_repository)
        yield running


@pytest.fixture
def new_peer(worker: RunningWorker) -> Iterator[NewPeer]:
    """Attached clients; at the end of the test the worker must hold what it held before."""
    before = footprint(worker)
    peers: list[HandOverPeer] = []

    def attach() -> HandOverPeer:
        peer = HandOverPeer(worker.sockets.pop())
        peer.attach()
        peers.append(peer)
        return peer

    yield attach
    for peer in peers:
        peer.sock.close()
    wait_for(lambda: is_back(worker, (before[0], before[1] - len(peers))), worker)


def footprint(worker: RunningWorker) -> tuple[int, int]:
    """Bytes of arenas and shared tensors, and descriptors."""
    return worker.status().arena_bytes, worker.fd_count()


def is_back(worker: RunningWorker, before: tuple[int, int]) -> bool:
    """Also where the worker's collector has closed what it had left open while it loaded models."""
    size, fds = footprint(worker)
    return size == before[0] and fds <= before[1]


def wait_for(holds: Callable[[], bool], worker: RunningWorker) -> None:
    ends_s = time.monotonic() + SETTLE_S_MAX
    while not holds():
        assert time.monotonic() < ends_s, footprint(worker)
        time.sleep(0.01)


def reason(answer: Any) -> str:
    return pb.Reason.Name(answer.status.reason).removeprefix("REASON_")


def infer_imported(peer: HandOverPeer, imported: lane_pb2.Imported, call: int = 1) -> Any:
    return peer.answer(by_ref(call, ref_to(imported)))


def test_a_tensor_alone_is_handed_over_without_a_copy(new_peer: NewPeer) -> None:
    camera, detector = new_peer(), new_peer()
    exported = camera.export(camera.alone(PICTURE), PICTURE)
    assert (reason(exported), exported.copies, len(exported.token)) == ("UNSPECIFIED", 0, 16)
    imported = detector.take(exported.token)
    assert tuple(imported.shape) == PICTURE.shape
    assert imported.data_type == tensor_pb2.DATA_TYPE_FP32
    assert (imported.size, imported.chunk_size) == (PICTURE.nbytes, PICTURE.nbytes)
    assert np.array_equal(detector.array_of(imported), PICTURE)


def test_it_is_the_same_memory(new_peer: NewPeer) -> None:
    camera, detector = new_peer(), new_peer()
    ref = camera.alone(SMALL)
    imported = detector.take(camera.export(ref, SMALL).token)
    mapping = camera.chunks[ref.epoch, ref.chunk]
    mapping[:4] = np.float32(99).tobytes()  # which an exporter must not do; the seal leaves it
    assert detector.array_of(imported)[0] == 99


def test_an_importer_can_only_read(new_peer: NewPeer) -> None:
    camera, detector = new_peer(), new_peer()
    fds: list[int] = []
    detector.on_imported = lambda imported, fd: fds.append(fd)  # type: ignore[method-assign]
    detector.take(camera.export(camera.alone(SMALL), SMALL).token)
    (fd,) = fds
    with pytest.raises(PermissionError):
        mmap.mmap(fd, PAGE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


@pytest.mark.parametrize("array", [SMALL.repeat(1000), PICTURE.ravel()], ids=["small", "large"])
def test_a_result_is_copied_once_into_memory_of_its_own(
    new_peer: NewPeer, array: np.ndarray[Any, Any]
) -> None:
    camera, detector = new_peer(), new_peer()
    response = camera.answer(by_ref(1, camera.place(camera.grow(array.nbytes), array)))
    slot = response.outputs[0].ref
    exported = camera.export(slot, array)
    assert (reason(exported), exported.copies) == ("UNSPECIFIED", 1)
    camera.release(slot)
    other = camera.answer(by_ref(2, camera.place(camera.grow(array.nbytes), -array)))
    assert other.outputs[0].ref.offset == slot.offset  # the slot has something else now
    imported = detector.take(exported.token)
    assert np.array_equal(detector.array_of(imported), array)
    assert imported.chunk_size == -(-array.nbytes // PAGE) * PAGE  # and shows nothing but it


def test_an_imported_tensor_is_an_input(new_peer: NewPeer) -> None:
    camera, detector = new_peer(), new_peer()
    array = PICTURE.ravel()
    imported = detector.take(camera.export(camera.alone(array), array).token)
    for call in range(1, 4):
        response = infer_imported(detector, imported, call)
        assert reason(response) == "UNSPECIFIED", response.status.message
        assert np.array_equal(detector.read(response.outputs[0].ref), array)
        detector.release(response.outputs[0].ref)


def test_the_exporter_can_still_use_its_tensor(new_peer: NewPeer) -> None:
    camera, detector = new_peer(), new_peer()
    ref = camera.alone(SMALL)
    detector.take(camera.export(ref, SMALL).token)
    assert camera.answer(by_ref(1, ref)).outputs[0].raw == SMALL.tobytes()


def test_one_tensor_goes_to_several(new_peer: NewPeer) -> None:
    camera, readers = new_peer(), [new_peer() for _ in range(3)]
    ref = camera.alone(SMALL)
    taken = [reader.take(camera.export(ref, SMALL).token) for reader in readers]
    assert len({imported.epoch for imported in taken}) == 3
    for reader, imported in zip(readers, taken, strict=True):
        assert np.array_equal(reader.array_of(imported), SMALL)
    assert len({reader.imported_inodes.popitem()[1] for reader in readers}) == 1


def test_who_was_handed_it_on_keeps_it(new_peer: NewPeer) -> None:
    camera, detector, reader = new_peer(), new_peer(), new_peer()
    first = detector.take(camera.export(camera.alone(SMALL), SMALL).token)
    again = detector.export(ref_to(first), SMALL.reshape(2, 4))
    assert (reason(again), again.copies) == ("UNSPECIFIED", 0)
    second = reader.take(again.token)
    camera.end()
    detector.end()
    assert np.array_equal(reader.array_of(second), SMALL.reshape(2, 4))
    assert infer_imported(reader, second).outputs[0].raw == SMALL.tobytes()


def test_a_token_is_good_once(new_peer: NewPeer) -> None:
    camera, detector, reader = new_peer(), new_peer(), new_peer()
    token = camera.export(camera.alone(SMALL), SMALL).token
    detector.take(token)
    refused = reader.take(token)
    assert reason(refused) == "FAILED_PRECONDITION"
    assert "used before" in refused.status.message


def test_an_expired_token_is_refused_and_its_memory_goes(
    new_peer: NewPeer, worker: RunningWorker
) -> None:
    camera, detector = new_peer(), new_peer()
    before = footprint(worker)
    ref = camera.alone(SMALL)
    token = camera.export(ref, SMALL, lifetime_ms=1).token
    camera.drop(ref.epoch, ref.chunk)
    time.sleep(0.01)
    assert reason(detector.take(token)) == "FAILED_PRECONDITION"
    camera.export(camera.alone(SMALL), SMALL, lifetime_ms=1)
    camera.drop(ref.epoch, ref.chunk + 1)
    wait_for(lambda: is_back(worker, before), worker)  # though nobody tried


def test_a_tensor_for_another_user_is_refused(new_peer: NewPeer) -> None:
    camera, detector = new_peer(), new_peer()
    exported = camera.export(camera.alone(SMALL), SMALL, uid=os.geteuid() + 1)
    refused = detector.take(exported.token)
    assert reason(refused) == "PERMISSION_DENIED"
    assert f"for uid {os.geteuid() + 1}" in refused.status.message


def test_a_revoke_ends_references_and_not_the_mapping(new_peer: NewPeer) -> None:
    camera, detector = new_peer(), new_peer()
    exported = camera.export(camera.alone(SMALL), SMALL)
    imported = detector.take(exported.token)
    assert infer_imported(detector, imported).outputs[0].raw == SMALL.tobytes()
    camera.ask("revoke", export_id=exported.export_id)
    told = detector.receive().revoked
    assert (told.epoch, told.request) == (imported.epoch, 0)
    refused = infer_imported(detector, imported, call=2)
    assert reason(refused) == "FAILED_PRECONDITION"
    assert "revoked by the one who exported it" in refused.status.message
    assert np.array_equal(detector.array_of(imported), SMALL)


def test_revoking_nothing_is_answered(new_peer: NewPeer) -> None:
    camera, detector = new_peer(), new_peer()
    exported = camera.export(camera.alone(SMALL), SMALL)
    detector.ask("revoke", export_id=exported.export_id)  # another's
    camera.ask("revoke", export_id=12345)
    assert reason(detector.take(exported.token)) == "UNSPECIFIED"


def test_a_dropped_import_cannot_be_referred_to(new_peer: NewPeer) -> None:
    camera, detector = new_peer(), new_peer()
    imported = detector.take(camera.export(camera.alone(SMALL), SMALL).token)
    detector.drop(imported.epoch)
    refused = infer_imported(detector, imported)
    assert reason(refused) == "FAILED_PRECONDITION"
    assert "this session has none such" in refused.status.message


def test_another_sessions_import_cannot_be_referred_to(new_peer: NewPeer) -> None:
    camera, detector, reader = new_peer(), new_peer(), new_peer()
    imported = detector.take(camera.export(camera.alone(SMALL), SMALL).token)
    assert reason(infer_imported(reader, imported)) == "FAILED_PRECONDITION"


def test_an_offer_goes_with_its_exporter(new_peer: NewPeer, worker: RunningWorker) -> None:
    camera, detector = new_peer(), new_peer()
    before = worker.status().arena_bytes
    token = camera.export(camera.alone(SMALL), SMALL).token
    assert worker.status().arena_bytes == before + PAGE
    camera.end()
    wait_for(lambda: worker.status().arena_bytes == before, worker)
    refused = detector.take(token)
    assert reason(refused) == "FAILED_PRECONDITION"
    assert "who exported it has ended" in refused.status.message


def test_a_copy_for_a_session_that_ends_is_let_go(new_peer: NewPeer) -> None:
    camera = new_peer()
    large = np.zeros(8 << 20, np.float32)
    slot = camera.answer(by_ref(1, camera.place(camera.grow(large.nbytes), large))).outputs[0].ref
    request = lane_pb2.ExportRequest(
        request=1, ref=slot, data_type=tensor_pb2.DATA_TYPE_FP32, shape=large.shape
    )
    camera.send(Request(export_tensor=request), Request(close=lane_pb2.Close()))
    # The fixture sees the worker's memory return.


def cases() -> dict[str, tuple[dict[str, Any], str, str]]:
    return {
        "unknown type": ({"data_type": 99}, "INVALID_ARGUMENT", "unknown data type 99"),
        "no type": ({"data_type": 0}, "INVALID_ARGUMENT", "unknown data type 0"),
        "strings": (
            {"data_type": tensor_pb2.DATA_TYPE_BYTES},
            "INVALID_ARGUMENT",
            "BYTES cannot be exported",
        ),
        "another shape": ({"shape": (9,)}, "INVALID_ARGUMENT", "shape [9] has 36 bytes, the refer"),
        "negative": ({"shape": (-8,)}, "INVALID_ARGUMENT", "negative dimension"),
    }


@pytest.mark.parametrize("case", cases())
def test_an_export_that_makes_no_sense_is_refused(new_peer: NewPeer, case: str) -> None:
    camera = new_peer()
    fields, expected, text = cases()[case]
    refused = camera.export(camera.alone(SMALL), SMALL, **fields)
    assert reason(refused) == expected
    assert text in refused.status.message
    assert not refused.token


def test_memory_of_others_is_refused(new_peer: NewPeer) -> None:
    camera, detector = new_peer(), new_peer()
    ref = camera.alone(SMALL)
    for epoch in (ref.epoch, detector.attachment.session, 2**32 - 1):
        refused = detector.export(Ref(epoch=epoch, size=SMALL.nbytes), SMALL)
        assert reason(refused) == "FAILED_PRECONDITION"
        assert "this session has none such" in refused.status.message


def test_a_tensor_beside_others_is_refused(new_peer: NewPeer) -> None:
    camera = new_peer()
    refused = camera.export(camera.place(camera.grow(64), SMALL), SMALL)
    assert reason(refused) == "INVALID_ARGUMENT"
    assert "can hold several tensors" in refused.status.message


def test_a_part_of_a_tensor_is_refused(new_peer: NewPeer) -> None:
    camera = new_peer()
    ref = camera.alone(PICTURE)
    part = Ref(epoch=ref.epoch, chunk=ref.chunk, size=SMALL.nbytes)
    assert reason(camera.export(part, SMALL)) == "INVALID_ARGUMENT"


def test_a_released_result_is_refused(new_peer: NewPeer) -> None:
    camera = new_peer()
    array = PICTURE.ravel()
    slot = camera.answer(by_ref(1, camera.place(camera.grow(array.nbytes), array))).outputs[0].ref
    camera.release(slot)
    refused = camera.export(slot, array)
    assert reason(refused) == "FAILED_PRECONDITION"
    assert "was released" in refused.status.message


def test_memory_that_its_client_has_sealed_is_refused(new_peer: NewPeer) -> None:
    camera = new_peer()
    camera.send(Request(grow=lane_pb2.GrowRequest(size=SMALL.nbytes, alone=True)))
    packet, (fd,), _, _ = socket.recv_fds(camera.sock, 1 << 16, 1)
    chunk = lane_pb2.LaneResponse.FromString(packet).chunk
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    os.close(fd)
    ref = Ref(epoch=chunk.epoch, chunk=chunk.chunk, size=SMALL.nbytes)
    refused = camera.export(ref, SMALL)
    assert reason(refused) == "FAILED_PRECONDITION"
    assert "F_SEAL_SEAL" in refused.status.message


def test_exports_are_bounded(new_peer: NewPeer) -> None:
    camera = new_peer()
    ref = camera.alone(SMALL)
    tokens = [camera.export(ref, SMALL) for _ in range(6)]
    refused = camera.export(ref, SMALL)
    assert reason(refused) == "RESOURCE_EXHAUSTED"
    assert "this session shares 6 tensors" in refused.status.message
    camera.ask("revoke", export_id=tokens[0].export_id)
    assert reason(camera.export(ref, SMALL)) == "UNSPECIFIED"


def test_unknown_things_can_be_dropped(new_peer: NewPeer) -> None:
    camera = new_peer()
    camera.grow(64)
    for epoch, chunk in ((camera.attachment.input_epoch, 0), (77, 0), (2**32 - 1, 2**32 - 1)):
        camera.send(Request(drop=lane_pb2.DropRequest(epoch=epoch, chunk=chunk)))
    ref = Ref(epoch=camera.attachment.input_epoch, size=SMALL.nbytes)
    assert reason(camera.answer(by_ref(1, ref))) == "UNSPECIFIED"


def test_many_hand_overs_leave_nothing_behind(new_peer: NewPeer, worker: RunningWorker) -> None:
    camera, detector = new_peer(), new_peer()
    before = footprint(worker)
    for _ in range(300):
        ref = camera.alone(SMALL)
        imported = detector.take(camera.export(ref, SMALL).token)
        camera.drop(ref.epoch, ref.chunk)
        assert np.array_equal(detector.array_of(imported), SMALL)
        detector.drop(imported.epoch)
    wait_for(lambda: is_back(worker, before), worker)


def test_a_request_in_flight_finishes_on_what_is_revoked_and_dropped(new_peer: NewPeer) -> None:
    camera, detector, other = new_peer(), new_peer(), new_peer()
    exported = camera.export(camera.alone(SMALL), SMALL)
    imported = detector.take(exported.token)
    request = by_ref(1, ref_to(imported), "slow")
    request.infer.inputs.append(tensor_of_array("turns", np.array(30_000, np.int64)))
    detector.send(request)
    other.answer(infer(1))  # the worker has read the one before
    camera.ask("revoke", export_id=exported.export_id)
    camera.end()
    detector.drop(imported.epoch)
    for _ in range(10):  # memory that could be in the place of it
        other.export(other.alone(-SMALL), SMALL)
    while (response := detector.receive()).WhichOneof("message") != "infer":
        pass
    assert response.infer.outputs[0].raw == SMALL.tobytes()
