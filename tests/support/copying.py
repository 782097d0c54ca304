# SPDX-License-Identifier: Apache-2.0
"""A program that any device can run: it copies its input to its output, within the device."""

from collections.abc import Mapping

from thirdrail import dtypes
from thirdrail.tensors import TensorSpec
from thirdrail_engines.cuda.device import Stream
from thirdrail_engines.cuda.program import OpenOutput, ProgramSpec
from thirdrail_engines.plans import Profile, Shape, ShapeRange


class CopyProgram:
    """See Program. x -> y, rows of floats."""

    def __init__(self, count_max: int = 1 << 20) -> None:
        tensors = [TensorSpec(name, dtypes.BY_NAME["FP32"], (-1,)) for name in "xy"]
        profile = Profile({"x": ShapeRange((0,), (1,), (count_max,))})
        self._spec = ProgramSpec((tensors[0],), (tensors[1],), (profile,))

    activation_bytes = 0

    @property
    def spec(self) -> ProgramSpec:
        return self._spec

    def new_context(self, stream: Stream) -> "CopyContext":
        return CopyContext()

    def close(self) -> None: ...


class CopyContext:
    """See Context."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._bytes = 0

    def prepare(
        self, profile: int, shapes: Mapping[str, Shape], stream: Stream
    ) -> dict[str, Shape]:
        self._bytes = 4 * shapes["x"][0]
        return {"y": shapes["x"]}

    def bind(self, name: str, address: int) -> None:
        self._places[name] = address

    def bind_open(self, output: str, room: OpenOutput) -> None:
        raise AssertionError("it has no open outputs")

    def use_activations(self, address: int) -> None:
        raise AssertionError("it needs none")

    def can_record(self, stream: Stream) -> bool:
        return self._bytes > 0

    def enqueue(self, stream: Stream) -> None:
        if self._bytes:
            stream.copy(self._places["y"], self._places["x"], self._bytes)

    def close(self) -> None: ...
