# SPDX-License-Identifier: Apache-2.0
"""What tests of engines on a twin write graphs with, and look at."""

import time
from collections.abc import Callable

from onnx import TensorProto, helper

from thirdrail_engines.cuda.engine import CudaEngine
from thirdrail_engines.cuda.twin import TwinStream

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Node = helper.make_node
Load = Callable[..., CudaEngine]


def compute_stream(engine: CudaEngine, number: int = 0) -> TwinStream:
    stream = engine._instances[number]._compute
    assert isinstance(stream, TwinStream)
    return stream


def wait_until(is_so: Callable[[], bool], s_max: float = 30) -> None:
    end = time.monotonic() + s_max
    while not is_so():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.001)
