# SPDX-License-Identifier: Apache-2.0
"""Who pays for memory that is handed over, and how much of it there may be."""

from typing import Any

import numpy as np
import pytest

from handover.conftest import CAMERA, DETECTOR, PAGE, READER
from thirdrail.errors import (
    InvalidArgument,
    ResourceExhausted,
)
from thirdrail.v1.tensor_pb2 import ArenaRef
from thirdrail_server.config import ConfigError, ExportLimits

Books = Any  # the classes that the fixtures give, see conftest.py


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
