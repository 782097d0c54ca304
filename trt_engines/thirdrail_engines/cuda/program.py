# SPDX-License-Identifier: Apache-2.0
"""What runs on a device: a compiled program, and contexts in which it runs.

Two implementations: a TensorRT plan, and in its place on the twin an ONNX graph that ONNX Runtime
computes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from thirdrail.tensors import TensorSpec
from thirdrail_engines.cuda.device import Stream
from thirdrail_engines.plans import Profile, Shape


class OpenOutput(Protocol):
    """Where a result goes whose size only the run tells. Never raises: no Python calls it."""

    def reserve(self, nbytes: int) -> int:
        """The address of device memory of at least `nbytes`; 0 if there is none."""
        ...

    def tell(self, shape: Shape) -> None: ...


class Context(Protocol):
    """One execution at a time: `prepare`, `bind` each tensor, `enqueue`. Not for two threads at
    once. All raise EngineError when the program refuses."""

    def prepare(
        self, profile: int, shapes: Mapping[str, Shape], stream: Stream
    ) -> dict[str, Shape]:
        """Set the inputs' shapes. Returns the outputs', with -1 where only the run tells."""
        ...

    def bind(self, name: str, address: int) -> None: ...

    def bind_open(self, output: str, room: OpenOutput) -> None: ...

    def use_activations(self, address: int) -> None:
        """Memory of Program.activation_bytes, for what is enqueued next, until that is done. Not
        called where there are none."""
        ...

    def can_record(self, stream: Stream) -> bool:
        """Whether `enqueue` can be captured into a graph, with what was set."""
        ...

    def enqueue(self, stream: Stream) -> None:
        """Give the run to the stream. Where there are open outputs, their shapes are told when this
        returns."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """inputs, outputs: -1 for open dimensions, and no optional ones. No BYTES.

    profiles: none where no input has an open dimension.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]


class Program(Protocol):
    @property
    def spec(self) -> ProgramSpec: ...

    @property
    def activation_bytes(self) -> int:
        """What a run of any context needs beside inputs and outputs, and is to be given; 0 where
        contexts have it themselves."""
        ...

    def new_context(self, stream: Stream) -> Context:
        """stream: where it will run. Raises EngineError, OutOfDeviceMemory."""
        ...

    def close(self) -> None:
        """All contexts are closed."""
        ...


def largest_shapes(spec: ProgramSpec, profile: int) -> dict[str, Shape]:
    """Each input's largest shape within a profile."""
    ranges = spec.profiles[profile].inputs if spec.profiles else {}
    return {
        tensor.name: ranges[tensor.name].largest if tensor.name in ranges else tensor.shape
        for tensor in spec.inputs
    }


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """The profile for these shapes: of those that take them, the one whose best shapes are nearest,
    and of equally near ones the first. None: no profile takes them.

    Near is measured in steps of a dimension, summed over all of them.
    """
    if not profiles:
        return 0
    fitting = [
        (_distance(profile, shapes), index)
        for index, profile in enumerate(profiles)
        if all(_fits(profile, name, shape) for name, shape in shapes.items())
    ]
    return min(fitting)[1] if fitting else None


def refusal(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> str:
    """Why no profile takes these shapes, in words for the caller."""
    for name, shape in shapes.items():
        if not any(_fits(profile, name, shape) for profile in profiles):
            taken = " or ".join(
                f"{list(profile.inputs[name].smallest)} to {list(profile.inputs[name].largest)}"
                for profile in profiles
            )
            return f"input '{name}' has the shape {list(shape)}, this model takes {taken}"
    given = ", ".join(f"'{name}' {list(shape)}" for name, shape in shapes.items())
    return f"no profile of this model takes these shapes together: {given}"


def _fits(profile: Profile, name: str, shape: Shape) -> bool:
    known = profile.inputs.get(name)
    if known is None:  # it has no open dimension, and was checked
        return True
    if len(shape) != len(known.smallest):
        return False
    return all(
        low <= dim <= high
        for low, dim, high in zip(known.smallest, shape, known.largest, strict=True)
    )


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> int:
    return sum(
        abs(dim - best)
        for name, known in profile.inputs.items()
        if name in shapes
        for dim, best in zip(shapes[name], known.best, strict=True)
    )
