# SPDX-License-Identifier: Apache-2.0
"""What a model version accepts and gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from thirdrail.tensors import TensorSpec
from thirdrail_engines.engine import EngineError
from thirdrail_server.worker.output_shapes import OutputShapes


@dataclass(frozen=True, slots=True)
class VersionSpec:
    """What a model version accepts and gives. Where it batches, shapes include the rows."""

    model: str
    version: int
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    batch_rows_max: int  # 0: the model does not batch
    positional_inputs: frozenset[str]
    labels: Mapping[str, tuple[str, ...]]  # class names, for outputs that have them
    input_names: list[str] = field(init=False)
    output_shapes: OutputShapes = field(
        init=False, default_factory=OutputShapes, compare=False, repr=False
    )
    # How many elements shapes have that were found right: (name, data type, shape) -> count. Most
    # requests look like an earlier one.
    good_shapes: dict[tuple[str, int, tuple[int, ...]], int] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_names", list(self.inputs))

    def check_rows(self, output: str, shape: tuple[int, ...], rows: int) -> None:
        """Of a result. Raises EngineError where the model batches and it has other ones."""
        if self.batch_rows_max and (not shape or shape[0] != rows):
            raise EngineError(
                f"model '{self.model}' returned output '{output}' of shape {list(shape)} "
                f"for a batch of {rows} rows"
            )
