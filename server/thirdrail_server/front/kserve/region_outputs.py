# SPDX-License-Identifier: Apache-2.0
"""The outputs of a request that go to shared-memory regions instead of into its reply."""

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack

from thirdrail.dtypes import Buffer
from thirdrail_server.front.dispatch import Result
from thirdrail_server.front.kserve import responses
from thirdrail_server.front.kserve.cuda_regions import CudaPart
from thirdrail_server.front.kserve.regions import AnyPart, RegionPart

# More is written beside the event loop: about 0.2 ms, where a hand-over costs about 0.1 ms.
WRITE_ON_LOOP_BYTES_MAX = 1 << 20

_Write = tuple[str, Buffer, RegionPart]


async def written_to_regions(
    result: Result, targets: Mapping[str, AnyPart], held: ExitStack
) -> responses.Data:
    """Write the outputs that have a target there. Returns the others' bytes, and b"" for them.

    held: gives the result and the regions back; taken away when the caller is cancelled while they
        are still being used.
    Raises Internal for a target that is too small, InvalidArgument for a region that has become
    so, ResourceExhausted when the host has no memory for it; then some may have been written.
    """
    data: list[Buffer | None] = []
    writes: list[_Write] = []
    for tensor, raw in zip(result.response.outputs, result.data, strict=True):
        target = targets.get(tensor.name)
        if target is None:
            data.append(raw)
            continue
        if isinstance(target, CudaPart):  # the worker has written it
            data.append(b"")
            continue
        elements = raw if raw is not None else responses.inline_elements(tensor)
        target.check_room(tensor.name, memoryview(elements).nbytes)
        writes.append((tensor.name, elements, target))
        data.append(b"")
    if sum(memoryview(elements).nbytes for _, elements, _ in writes) <= WRITE_ON_LOOP_BYTES_MAX:
        _write(writes)
    else:
        await _write_beside_loop(writes, held)
    return data


def _write(writes: list[_Write]) -> None:
    for output, elements, target in writes:
        target.write(output, elements)


async def _write_beside_loop(writes: list[_Write], held: ExitStack) -> None:
    writing = asyncio.get_running_loop().run_in_executor(None, _write, writes)
    try:
        await asyncio.wait((writing,))
    except asyncio.CancelledError:
        # The thread cannot be stopped: what it reads and writes is held until it has ended.
        kept = held.pop_all()
        writing.add_done_callback(lambda _: kept.close())
        writing.add_done_callback(asyncio.Future.exception)  # nobody else will look
        raise
    writing.result()
