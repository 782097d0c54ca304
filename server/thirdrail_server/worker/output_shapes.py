# SPDX-License-Identifier: Apache-2.0
"""What shapes a model's results will have, as far as earlier runs tell.

A result whose shape is known before the run is written by the engine straight into the caller's
slot, which spares a copy. Where the model's declaration leaves a dimension open, inputs of the same
shapes gave results of the same shapes before, for almost every model. One whose results depend on
the inputs' elements (NonZero, beam search) is found out by the first run that disagrees: the engine
refuses the memory, the run is repeated without it, and that output is never foretold again.
"""

from collections.abc import Collection, Mapping

from thirdrail.tensors import Array

INPUT_SHAPES_MAX = 256  # per model version; what comes after has its results copied

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class OutputShapes:
    """The memory of one model version. Threads may share it: each step is one dict operation."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Shape, ...], dict[str, Shape]] = {}
        self._unforeseeable: set[str] = set()

    def foretell(self, inputs: Mapping[str, Array]) -> Shapes:
        """By output name, for those that are worth it and were seen for inputs of these shapes.

        inputs: in the model's order, as all requests have them.
        """
        return self._seen.get(_key(inputs), {}) if self._seen else {}

    def note(self, inputs: Mapping[str, Array], name: str, shape: Shape) -> None:
        """A large result had to be copied, since nobody knew its shape."""
        if name in self._unforeseeable:
            return
        key = _key(inputs)
        if key in self._seen or len(self._seen) < INPUT_SHAPES_MAX:
            self._seen.setdefault(key, {})[name] = shape

    def was_wrong(self, names: Collection[str]) -> None:
        """A run failed with memory for these outputs and succeeded without."""
        self._unforeseeable.update(names)
        for shapes in list(self._seen.values()):
            for name in names:
                shapes.pop(name, None)


def _key(inputs: Mapping[str, Array]) -> tuple[Shape, ...]:
    return tuple([array.shape for array in inputs.values()])
