# SPDX-License-Identifier: Apache-2.0
"""Tests on a real CUDA device: `make test-gpu`. Without one they are skipped, and say why.

THIRDRAIL_TEST_UUID chooses among several devices. As of now: not yet run on a GPU.
"""

import os
from collections.abc import Iterator

import pytest

from engines.conftest import build_model_fixture, identity, inspector, write_model
from thirdrail_engines.cuda.driver import DriverDevice, open_device
from thirdrail_engines.plans import Builder, BuildError

__all__ = ["build_model_fixture", "identity", "inspector", "write_model"]


@pytest.fixture(scope="session")
def why_no_gpu() -> str:
    try:
        open_device(os.environ.get("THIRDRAIL_TEST_UUID", "")).close()
    except BuildError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def needs_gpu(why_no_gpu: str) -> None:
    if why_no_gpu:
        pytest.skip(why_no_gpu)


@pytest.fixture
def device(needs_gpu: None) -> Iterator[DriverDevice]:
    opened = open_device(os.environ.get("THIRDRAIL_TEST_UUID", ""))
    yield opened
    opened.close()


@pytest.fixture(params=[Builder.TENSORRT_RTX, Builder.TENSORRT])
def builder(request: pytest.FixtureRequest) -> Builder:
    """Each TensorRT that is installed."""
    from thirdrail_engines.tensorrt import installed_builders

    wanted: Builder = request.param
    if wanted not in dict(installed_builders()):
        pytest.skip(f"{wanted} is not installed")
    return wanted
