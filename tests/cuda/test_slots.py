# SPDX-License-Identifier: Apache-2.0
"""Which instance and which of its slots take the next run."""

import threading
from concurrent.futures import ThreadPoolExecutor

from thirdrail_engines.cuda.slots import SlotTable


def test_runs_go_to_the_idlest_instance_and_its_warmest_slot() -> None:
    table = SlotTable([["a1", "a2"], ["b1", "b2"]])
    with table.taken() as first:
        with table.taken() as second, table.taken() as third, table.taken() as fourth:
            assert [first, second, third, fourth] == ["a1", "b1", "a2", "b2"]
            assert table.busy == 4
        with table.taken() as again:
            assert again == "b1"
    with table.taken() as first:
        assert first == "a1"


def test_runs_go_where_the_device_has_nothing_left_to_do() -> None:
    busy = {"a1", "b1"}
    table = SlotTable([["a1", "a2"], ["b1", "b2"]], lambda slot: slot not in busy)
    with table.taken() as first, table.taken() as second, table.taken() as third:
        assert [first, second] == ["a2", "b2"]
        assert third == "a1", "all that are left are busy"
    busy = {"a1", "a2", "b1", "b2"}
    with table.taken() as first, table.taken() as second, table.taken() as third:
        assert third == "a2", "the one that was used first is done first"


def test_no_slot_is_taken_twice() -> None:
    table, held, lock = SlotTable([[1, 2], [3]]), set(), threading.Lock()

    def work(_: int) -> None:
        for _ in range(50):
            with table.taken() as slot:
                with lock:
                    assert slot not in held
                    held.add(slot)
                with lock:
                    held.discard(slot)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert table.busy == 0
