# SPDX-License-Identifier: Apache-2.0
"""What is revoked and what is handed on, and whom that reaches."""

from typing import Any

import pytest

from handover.conftest import CAMERA, DETECTOR, READER
from thirdrail.errors import (
    FailedPrecondition,
    ResourceExhausted,
)
from thirdrail.v1.tensor_pb2 import ArenaRef
from thirdrail_server.worker.exports import Told

Books = Any  # the classes that the fixtures give, see conftest.py


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
