# SPDX-License-Identifier: Apache-2.0
"""What every engine offers. Implementations obey the contract suite in tests/engines/."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from thirdrail.tensors import Array, TensorSpec


class ModelFileError(Exception):
    """The model file cannot be served: missing, damaged, or beyond what the engine supports."""


class EngineError(Exception):
    """One run failed. The text is the engine's, fit to be shown to the caller."""


class EngineInputError(EngineError):
    """An input is not for this engine: an element that no model of its kind takes, a shape beyond
    those that this one was built for, or values and shapes that the model cannot compute with."""


class EngineMemoryError(EngineError):
    """There was no memory for a run. A smaller one may have some, or the same one later."""


class DeviceLost(Exception):
    """The device is of no more use to this process, and every call to it will say so again. Only a
    new process can use it. No EngineError: it is about more than one run and one engine."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    platform: str  # the name that ModelConfig.platform uses, e.g. "onnxruntime_onnx"
    # Inputs that every consumer reads by position, so that memory which somebody else can still
    # write may be bound to them: a changed value changes a result, never an address. All other
    # inputs must be copied first.
    positional_inputs: frozenset[str]
    # Tensors whose rank the file does not tell. Their shape here is () and says nothing.
    unranked: frozenset[str] = frozenset()
    # The shapes of the inputs alone decide how much a run has to do: what was short once is short
    # for inputs no larger.
    sized_by_shapes: bool = False
    # Above 0: runs wait for a device, which overlaps this many of them for each instance. Their
    # threads' CPU time says nothing about how long they take.
    overlapped_runs: int = 0
    # Above 0: a run that takes longer will never end. Nothing calls back a thread that waits in the
    # driver, so whoever has the engine must then treat the device as lost.
    run_s_max: float = 0.0


class Engine(Protocol):
    """A model, loaded and runnable. `run` may be called from several threads at once."""

    @property
    def spec(self) -> EngineSpec: ...

    def run(
        self,
        inputs: Mapping[str, Array],
        wanted: Sequence[str],
        into: Mapping[str, Array],
    ) -> dict[str, Array]:
        """Run once. Releases the GIL while it computes.

        inputs: C-contiguous arrays by name, BYTES as object arrays of bytes; optional ones may be
            absent.
        wanted: the outputs to compute.
        into: for some of them, writable arrays of exactly the result's type and shape, which the
            engine may write them to. It never does so after it returned or raised.

        Returns each wanted output: the array of `into` itself where the engine wrote there without
        a copy of its own, any other array where it did not, as for small results. Results never
        share memory with the inputs. BYTES come as object arrays of bytes.
        Raises EngineError when the run fails, also when an array of `into` does not fit;
        EngineInputError for what nobody but the caller can change; EngineMemoryError; DeviceLost.
        """
        ...

    def close(self) -> None:
        """Give back all memory. No run may be under way or follow."""
        ...
