# SPDX-License-Identifier: Apache-2.0
import itertools
import mmap
from typing import Any

import pytest

from thirdrail.lane.memory import whole_pages
from thirdrail.v1 import tensor_pb2
from thirdrail_server.config import ExportLimits
from thirdrail_server.worker.export_life import Export, Party, Tensor, Terms
from thirdrail_server.worker.exports import ExportRegistry
from thirdrail_server.worker.tensor_memory import TensorMemory

UID = 1000
CAMERA, DETECTOR, READER = 1, 2, 3  # sessions
OTHER_UID = 1001
PAGE = mmap.PAGESIZE
MS = 1_000_000


class Books:
    """A registry and what it let go of. Memory is real, its descriptor is none."""

    def __init__(self, **limits: Any) -> None:
        self.now_ns = 0
        self.disposed: list[TensorMemory] = []
        self.registry = ExportRegistry(
            ExportLimits(**limits), new_epoch=itertools.count(1).__next__, dispose=self._dispose
        )

    def _dispose(self, memory: TensorMemory) -> None:
        assert memory not in self.disposed, "let go of twice"
        self.disposed.append(memory)

    def memory(self, size: int = 64) -> TensorMemory:
        return TensorMemory(-1, mmap.mmap(-1, whole_pages(size)))

    def offer(
        self,
        session: int,
        memory: TensorMemory | None = None,
        *,
        size: int = 64,
        uid: int | None = None,
        life_ms: int = 0,
        is_kept: bool = False,
    ) -> Export:
        tensor = Tensor(size, tensor_pb2.DATA_TYPE_UINT8, (size,))
        return self.registry.offer(
            Party(session, UID),
            memory or self.memory(size),
            tensor,
            Terms(uid, life_ms),
            self.now_ns,
            is_kept=is_kept,
        )

    def offer_again(self, session: int, epoch: int, *, size: int = 64) -> Export:
        tensor = Tensor(size, tensor_pb2.DATA_TYPE_UINT8, (size,))
        return self.registry.offer_again(Party(session, UID), epoch, tensor, Terms(), self.now_ns)

    def take(self, session: int, token: bytes, uid: int = UID) -> Export:
        return self.registry.take(Party(session, uid), token, self.now_ns)


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def new_books() -> type[Books]:
    return Books
