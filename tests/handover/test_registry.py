# SPDX-License-Identifier: Apache-2.0
"""The books of what clients hand to each other: who may take, refer to, revoke; when it is gone."""

import mmap
from typing import Any

import numpy as np
import pytest

from thirdrail.errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
)
from thirdrail.v1.tensor_pb2 import ArenaRef
from thirdrail_server.config import ConfigError, ExportLimits
from thirdrail_server.worker.export_life import LIFE, Event, State, next_state
from thirdrail_server.worker.exports import Told

Books = Any  # the classes that the fixtures give, see conftest.py

CAMERA, DETECTOR, READER = 1, 2, 3  # sessions
OTHER_UID = 1001
PAGE = mmap.PAGESIZE
MS = 1_000_000


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


def test_a_revoked_offer_is_gone(books: Books) -> None:
    memory = books.memory()
    export = books.offer(CAMERA, memory)
    assert books.registry.revoke(CAMERA, export.number) == []
    with pytest.raises(FailedPrecondition, match="was revoked"):
        books.take(DETECTOR, export.token)
    assert books.disposed == [memory]


def test_a_revoked_import_is_refused_and_its_memory_stays_until_it_is_given_back(
    books: Books,
) -> None:
    memory = books.memory()
    export = books.offer(CAMERA, memory)
    taken = books.take(DETECTOR, export.token)
    in_flight = books.registry.view(DETECTOR, "x", ArenaRef(epoch=taken.epoch, size=64))
    assert books.registry.revoke(CAMERA, export.number) == [Told(DETECTOR, taken.epoch)]
    with pytest.raises(FailedPrecondition, match="revoked by the one who exported it"):
        books.registry.view(DETECTOR, "x", ArenaRef(epoch=taken.epoch, size=64))
    assert not books.disposed
    assert books.registry.revoke(CAMERA, export.number) == []  # heard of once
    books.registry.release(DETECTOR, taken.epoch)
    assert books.disposed == [memory]
    assert not in_flight.any()  # on memory that is still there


def test_only_the_exporter_can_revoke(books: Books) -> None:
    export = books.offer(CAMERA)
    for session in (DETECTOR, READER):
        assert books.registry.revoke(session, export.number) == []
    assert books.registry.revoke(CAMERA, export.number + 1) == []
    books.take(DETECTOR, export.token)


def test_handing_on_needs_no_new_memory(books: Books) -> None:
    memory = books.memory()
    first = books.take(DETECTOR, books.offer(CAMERA, memory).token)
    second = books.take(READER, books.offer_again(DETECTOR, first.epoch).token)
    assert second.memory is memory
    assert second.tensor == first.tensor
    books.registry.end(CAMERA)
    books.registry.end(DETECTOR)
    assert not books.disposed
    books.registry.end(READER)
    assert books.disposed == [memory]


def test_a_revoke_reaches_those_to_whom_it_was_handed_on(books: Books) -> None:
    export = books.offer(CAMERA)
    first = books.take(DETECTOR, export.token)
    second = books.take(READER, books.offer_again(DETECTOR, first.epoch).token)
    offered = books.offer_again(READER, second.epoch)
    books.registry.release(DETECTOR, first.epoch)  # who handed it on has nothing to do with it
    assert books.registry.revoke(CAMERA, export.number) == [Told(READER, second.epoch)]
    with pytest.raises(FailedPrecondition, match="revoked"):
        books.take(DETECTOR, offered.token)


def test_a_revoke_does_not_reach_those_before(books: Books) -> None:
    first = books.take(DETECTOR, books.offer(CAMERA).token)
    again = books.offer_again(DETECTOR, first.epoch)
    second = books.take(READER, again.token)
    assert books.registry.revoke(DETECTOR, again.number) == [Told(READER, second.epoch)]
    assert books.registry.imported(DETECTOR, first.epoch) is first


def test_handing_on_is_bounded(new_books: Any) -> None:
    books = new_books(hops_max=2)
    first = books.take(DETECTOR, books.offer(CAMERA).token)
    second = books.take(READER, books.offer_again(DETECTOR, first.epoch).token)
    with pytest.raises(ResourceExhausted, match="handed on 2 times"):
        books.offer_again(READER, second.epoch)


def test_what_is_not_imported_or_was_revoked_cannot_be_handed_on(books: Books) -> None:
    export = books.offer(CAMERA)
    taken = books.take(DETECTOR, export.token)
    with pytest.raises(FailedPrecondition, match="this session has none such"):
        books.offer_again(READER, taken.epoch)
    books.registry.revoke(CAMERA, export.number)
    with pytest.raises(FailedPrecondition, match="has been revoked"):
        books.offer_again(DETECTOR, taken.epoch)


def charges(books: Books) -> list[int]:
    """Pages charged to camera, detector, reader."""
    charged = [books.registry.charged_bytes(each) for each in (CAMERA, DETECTOR, READER)]
    assert sum(charged) == books.registry.total_bytes
    return [each // PAGE for each in charged]


def test_the_exporter_pays_until_it_ends_then_the_importer(books: Books) -> None:
    taken = books.take(DETECTOR, books.offer(CAMERA).token)
    assert charges(books) == [1, 0, 0]
    books.registry.end_offers(CAMERA)  # it ends, its process is still there
    assert charges(books) == [1, 0, 0]
    books.registry.end(CAMERA)
    assert charges(books) == [0, 1, 0]
    books.registry.release(DETECTOR, taken.epoch)
    assert charges(books) == [0, 0, 0]


def test_who_was_told_of_a_revoke_pays_for_what_it_keeps_mapped(books: Books) -> None:
    export = books.offer(CAMERA)
    taken = books.take(DETECTOR, export.token)
    books.registry.revoke(CAMERA, export.number)
    assert charges(books) == [0, 1, 0]
    books.registry.release(DETECTOR, taken.epoch)
    assert charges(books) == [0, 0, 0]


def test_the_maker_of_a_chunk_pays_while_it_uses_it(books: Books) -> None:
    memory = books.memory()
    export = books.offer(CAMERA, memory, is_kept=True)
    books.take(DETECTOR, export.token)
    books.registry.revoke(CAMERA, export.number)
    assert charges(books) == [1, 0, 0]
    books.registry.drop_kept(memory)
    assert charges(books) == [0, 1, 0]


def test_memory_shared_several_times_is_charged_once(books: Books) -> None:
    memory = books.memory()
    for session in (DETECTOR, READER):
        books.take(session, books.offer(CAMERA, memory).token)
    assert charges(books) == [1, 0, 0]
    books.registry.end(CAMERA)
    assert charges(books) == [0, 1, 0]
    books.registry.end(DETECTOR)
    assert charges(books) == [0, 0, 1]


def test_a_handed_on_offer_is_charged_to_who_handed_it_on(books: Books) -> None:
    first = books.take(DETECTOR, books.offer(CAMERA).token)
    books.offer_again(DETECTOR, first.epoch)
    books.registry.end(CAMERA)
    books.registry.release(DETECTOR, first.epoch)
    assert charges(books) == [0, 1, 0]


def test_a_tensor_is_handed_on_whole(books: Books) -> None:
    taken = books.take(DETECTOR, books.offer(CAMERA).token)
    with pytest.raises(InvalidArgument, match="handed on whole: it has 64 bytes, got 32"):
        books.offer_again(DETECTOR, taken.epoch, size=32)


def test_figures_count_what_is_shared(books: Books) -> None:
    taken = books.take(DETECTOR, books.offer(CAMERA).token)
    books.offer(CAMERA)
    assert books.registry.export_count(CAMERA) == 2
    assert books.registry.import_count(DETECTOR) == 1
    assert books.registry.has_offers
    books.registry.end(CAMERA)
    assert books.registry.export_count(CAMERA) == 0
    assert not books.registry.has_offers
    books.registry.release(DETECTOR, taken.epoch)
    assert books.registry.import_count(DETECTOR) == 0


def test_exports_of_a_session_are_bounded(new_books: Any) -> None:
    books = new_books(exports_per_session_max=2)
    export = books.offer(CAMERA)
    taken = books.take(DETECTOR, export.token)
    books.offer(CAMERA)
    with pytest.raises(ResourceExhausted, match="this session shares 2 tensors"):
        books.offer(CAMERA)
    with pytest.raises(ResourceExhausted, match="this session shares 2 tensors"):
        books.registry.begin_copy(CAMERA, 1)
    books.offer(READER)  # another's limit
    books.registry.release(DETECTOR, taken.epoch)
    books.offer(CAMERA)


def test_exports_of_all_are_bounded(new_books: Any) -> None:
    books = new_books(exports_total_max=2)
    books.offer(CAMERA)
    books.offer(DETECTOR)
    with pytest.raises(ResourceExhausted, match="this worker's clients share 2 tensors"):
        books.offer(READER)


def test_imports_of_a_session_are_bounded(new_books: Any) -> None:
    books = new_books(imports_per_session_max=1)
    taken = books.take(DETECTOR, books.offer(CAMERA).token)
    token = books.offer(CAMERA).token
    with pytest.raises(ResourceExhausted, match="holds 1 imported tensors"):
        books.take(DETECTOR, token)
    books.registry.release(DETECTOR, taken.epoch)
    books.take(DETECTOR, token)  # the refusal did not use it up


def test_bytes_are_bounded(new_books: Any) -> None:
    books = new_books(bytes_per_session_max=2 * PAGE, bytes_total_max=3 * PAGE)
    memory = books.memory(2 * PAGE)
    books.offer(CAMERA, memory)
    books.offer(CAMERA, memory)  # no more bytes
    with pytest.raises(ResourceExhausted, match="8192 of the 8192 that this session may"):
        books.offer(CAMERA)
    with pytest.raises(ResourceExhausted, match="of the 12288 that all clients of this worker"):
        books.offer(DETECTOR, size=2 * PAGE)
    books.offer(DETECTOR)


def test_copies_being_made_count_as_exports(new_books: Any) -> None:
    books = new_books(exports_per_session_max=1)
    copying = books.registry.begin_copy(CAMERA, PAGE)
    with pytest.raises(ResourceExhausted, match="this session shares 1 tensors"):
        books.registry.begin_copy(CAMERA, PAGE)
    books.registry.end_copy(copying)
    books.offer(CAMERA)


def test_a_copy_is_counted_while_it_is_made(new_books: Any) -> None:
    books = new_books(bytes_per_session_max=2 * PAGE)
    copying = books.registry.begin_copy(CAMERA, 2 * PAGE)
    assert charges(books) == [2, 0, 0]
    with pytest.raises(ResourceExhausted):
        books.registry.begin_copy(CAMERA, 1)
    books.registry.end(CAMERA)  # while it is still being made
    books.registry.end_copy(copying)
    assert charges(books) == [0, 0, 0]


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="hops_max must be 1 or more, got 0"):
        ExportLimits(hops_max=0)
    with pytest.raises(ConfigError, match="life_ms_default must be at most life_ms_max, 10"):
        ExportLimits(life_ms_default=11, life_ms_max=10)


def test_a_view_outlives_everything(books: Books) -> None:
    memory = books.memory()
    memory.mapping[:1] = b"\x07"
    taken = books.take(DETECTOR, books.offer(CAMERA, memory).token)
    view = books.registry.view(DETECTOR, "x", ArenaRef(epoch=taken.epoch, size=64))
    books.registry.end(CAMERA)
    books.registry.end(DETECTOR)
    assert books.disposed == [memory]
    with pytest.raises(BufferError):  # so the janitor waits for it
        memory.mapping.close()
    assert view[0] == 7
    assert isinstance(view, np.ndarray)
