# SPDX-License-Identifier: Apache-2.0
"""A cache of the test's own, and plans for it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.plan_caches import key, put
from thirdrail_engines.plan_cache import Plan, PlanCache

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(folder: Path) -> Iterator[PlanCache]:
    with PlanCache(folder, 100 * MIB) as made:
        yield made


@pytest.fixture
def stored(cache: PlanCache) -> Callable[..., Plan]:
    """stored("name", data): a plan that was put and is no longer in use."""

    def store(name: str = "one", data: bytes = b"a plan") -> Plan:
        plan = put(cache, key(name), data)
        cache.release(plan.key)
        return plan

    return store
