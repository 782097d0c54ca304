# SPDX-License-Identifier: Apache-2.0
"""One load as a worker is asked for it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from thirdrail.errors import Internal
from thirdrail_server.control_messages import LoadedModel, LoadProgress
from thirdrail_server.front.control.load_source import PreparedLoad
from thirdrail_server.front.control.supervisor import Supervisor

TellProgress = Callable[[LoadProgress], None]


class TooLarge(Exception):
    """The worker has loaded it, and dropped it again, for it takes more than it may."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size  # bytes


async def load_in_worker(
    worker: Supervisor, prepared: PreparedLoad, progress: TellProgress
) -> LoadedModel:
    """Raises TooLarge, Internal where no version can be served, and what the worker raises."""

    def tell(fields: dict[str, Any]) -> None:
        progress(LoadProgress.from_fields(fields))

    answer = await worker.call("load", prepared.command.to_fields(), tell)
    if "too_large_bytes" in answer:
        raise TooLarge(int(answer["too_large_bytes"]))
    loaded = LoadedModel.from_fields(answer)
    if {*loaded.versions, *loaded.in_place, *loaded.engines} - dict(
        prepared.command.versions
    ).keys():
        raise Internal("the worker answered for versions that it was not asked for")
    versions: dict[int, str | None] = {**loaded.versions, **prepared.failures}
    if None not in versions.values():
        raise Internal("; ".join(f"version {v}: {text}" for v, text in sorted(versions.items())))
    return replace(loaded, versions=dict(sorted(versions.items())))
