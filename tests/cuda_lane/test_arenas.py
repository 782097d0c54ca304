# SPDX-License-Identifier: Apache-2.0
"""Arenas on a device that is nearly full."""

from dataclasses import replace

import pytest

from thirdrail.errors import ResourceExhausted
from thirdrail_engines.cuda.twin import TWIN_FACTS, TwinDevice
from thirdrail_server.worker.device_arenas import DeviceInput

MIB = 1 << 20


def test_an_arena_takes_what_is_needed_where_there_is_no_more() -> None:
    device = TwinDevice(replace(TWIN_FACTS, memory_bytes=6 * MIB))
    charged: list[int] = []

    def charge(size: int, /, *, is_spare: bool = False) -> None:
        charged.append(size)

    arena = DeviceInput(device, 64 * MIB, charge)
    chunks = [arena.grow(MIB) for _ in range(3)]  # the third would be of 4 MiB
    assert [chunk.message.size for chunk in chunks] == [2 * MIB] * 3
    assert sum(charged) == arena.total_bytes == 6 * MIB
    with pytest.raises(ResourceExhausted, match=r"no memory for 2097152 more bytes .* 0 are free"):
        arena.grow(1)
    assert sum(charged) == 6 * MIB
    for chunk in chunks:
        chunk.close()
    arena.close()
    device.close()
