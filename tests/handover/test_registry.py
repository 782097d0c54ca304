# SPDX-License-Identifier: Apache-2.0
"""The books of what clients hand to each other: who may take and refer to it."""

from typing import Any

import pytest

from handover.conftest import CAMERA, DETECTOR, MS, OTHER_UID, PAGE, READER
from thirdrail.errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
)
from thirdrail.v1.tensor_pb2 import ArenaRef
from thirdrail_server.worker.export_life import LIFE, Event, State, next_state

Books = Any  # the classes that the fixtures give, see conftest.py


def test_an_export_that_ended_stays_ended() -> None:
    assert all(next_state(State.ENDED, event) is State.ENDED for event in Event)
    assert {before for before, _ in LIFE} == {State.OFFERED, State.TAKEN, State.REVOKED}


def test_an_importer_reads_the_exporters_bytes(books: Books) -> None:
    memory = books.memory()
    memory.mapping[:4] = b"page"
    taken = books.take(DETECTOR, books.offer(CAMERA, memory).token)
    view = books.registry.view(DETECTOR, "x", ArenaRef(epoch=taken.epoch, size=4))
    assert bytes(view) == b"page"
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_a_token_is_good_once(books: Books) -> None:
    token = books.offer(CAMERA).token
    books.take(DETECTOR, token)
    with pytest.raises(FailedPrecondition, match="used before"):
        books.take(READER, token)


@pytest.mark.parametrize("token", [b"", b"\0" * 16, b"x" * 100])
def test_an_unknown_token_is_refused(books: Books, token: bytes) -> None:
    books.offer(CAMERA)
    with pytest.raises(FailedPrecondition, match="not good"):
        books.take(DETECTOR, token)


def test_a_token_is_for_one_user(books: Books) -> None:
    own = books.offer(CAMERA).token
    with pytest.raises(PermissionDenied, match="uid 1000, and the session is of uid 1001"):
        books.take(DETECTOR, own, uid=OTHER_UID)
    books.take(DETECTOR, own)  # it was not used up
    books.take(READER, books.offer(CAMERA, uid=OTHER_UID).token, uid=OTHER_UID)


def test_root_is_another_user(books: Books) -> None:
    with pytest.raises(PermissionDenied):
        books.take(DETECTOR, books.offer(CAMERA).token, uid=0)
    with pytest.raises(PermissionDenied):
        books.take(DETECTOR, books.offer(CAMERA, uid=0).token)


def test_a_token_expires(books: Books) -> None:
    memory = books.memory()
    token = books.offer(CAMERA, memory, life_ms=10).token
    books.now_ns = 10 * MS - 1
    books.registry.expire(books.now_ns)
    assert not books.disposed
    books.now_ns += 1
    with pytest.raises(FailedPrecondition, match="expired"):
        books.take(DETECTOR, token)
    assert books.disposed == [memory]


def test_expired_offers_are_let_go_without_anybody_asking(books: Books) -> None:
    memory = books.memory()
    books.offer(CAMERA, memory, life_ms=10)
    kept = books.offer(CAMERA, life_ms=20).token
    books.now_ns = 10 * MS
    books.registry.expire(books.now_ns)
    assert books.disposed == [memory]
    books.take(DETECTOR, kept)


def test_a_life_is_bounded(new_books: Any) -> None:
    books = new_books(life_ms_default=5, life_ms_max=10)
    assert books.offer(CAMERA).expires_ns == 5 * MS
    assert books.offer(CAMERA, life_ms=7).expires_ns == 7 * MS
    assert books.offer(CAMERA, life_ms=2**32 - 1).expires_ns == 10 * MS


def test_memory_goes_with_its_importer(books: Books) -> None:
    memory = books.memory()
    taken = books.take(DETECTOR, books.offer(CAMERA, memory).token)
    books.registry.end(CAMERA)
    assert not books.disposed
    assert books.registry.view(DETECTOR, "x", ArenaRef(epoch=taken.epoch, size=64)).size == 64
    books.registry.release(DETECTOR, taken.epoch)
    assert books.disposed == [memory]
    with pytest.raises(FailedPrecondition, match="this session has none such"):
        books.registry.view(DETECTOR, "x", ArenaRef(epoch=taken.epoch, size=64))


def test_memory_goes_with_the_last_of_several(books: Books) -> None:
    memory = books.memory()
    tokens = [books.offer(CAMERA, memory, is_kept=True).token for _ in range(2)]
    first = books.take(DETECTOR, tokens[0])
    books.take(READER, tokens[1])
    assert books.registry.drop_kept(memory)
    books.registry.release(DETECTOR, first.epoch)
    assert not books.disposed
    books.registry.end(READER)
    assert books.disposed == [memory]


def test_a_chunk_that_its_maker_still_uses_stays(books: Books) -> None:
    memory = books.memory()
    taken = books.take(DETECTOR, books.offer(CAMERA, memory, is_kept=True).token)
    books.registry.release(DETECTOR, taken.epoch)
    assert not books.disposed
    assert books.registry.drop_kept(memory)
    assert books.disposed == [memory]
    assert not books.registry.drop_kept(memory)


def test_offers_end_with_their_exporter(books: Books) -> None:
    memory = books.memory()
    token = books.offer(CAMERA, memory).token
    books.registry.end_offers(CAMERA)
    with pytest.raises(FailedPrecondition, match="who exported it has ended"):
        books.take(DETECTOR, token)
    assert books.disposed == [memory]


def test_a_session_sees_its_own_imports_only(books: Books) -> None:
    taken = books.take(DETECTOR, books.offer(CAMERA).token)
    for session in (CAMERA, READER):
        with pytest.raises(FailedPrecondition, match="this session has none such"):
            books.registry.view(session, "x", ArenaRef(epoch=taken.epoch, size=64))
        books.registry.release(session, taken.epoch)  # another's: ignored
    assert books.registry.view(DETECTOR, "x", ArenaRef(epoch=taken.epoch, size=64)).size == 64


@pytest.mark.parametrize(
    "place",
    [
        {"chunk": 1},
        {"offset": 32},
        {"offset": 64, "size": 37},
        {"offset": 2**64 - 64, "size": 128},
        {"size": 101},
        {"size": PAGE},  # the rest of the page is not the tensor's
    ],
)
def test_references_stay_within_the_tensor(books: Books, place: dict[str, int]) -> None:
    taken = books.take(DETECTOR, books.offer(CAMERA, size=100).token)
    with pytest.raises(InvalidArgument, match="imported tensor of 100 bytes"):
        books.registry.view(DETECTOR, "x", ArenaRef(epoch=taken.epoch, **place))


def test_a_whole_page_and_its_empty_end_can_be_referred_to(books: Books) -> None:
    taken = books.take(DETECTOR, books.offer(CAMERA, size=PAGE).token)
    assert books.registry.view(DETECTOR, "x", ArenaRef(epoch=taken.epoch, size=PAGE)).size == PAGE
    end = ArenaRef(epoch=taken.epoch, offset=PAGE, size=0)
    assert books.registry.view(DETECTOR, "x", end).size == 0
