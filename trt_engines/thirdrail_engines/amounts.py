# SPDX-License-Identifier: Apache-2.0
"""Whether the shapes of an ONNX graph's inputs alone decide how much it has to do.

Where they do, a run that was short says that others with inputs no larger are short as well, so
that they may run where everybody waits for them. Where they do not, one number in an input (the
end of a Range, the count of a Loop) could ask for anything, and every caller is a stranger.

The rule, which knows the operators of two domains up to the versions below: an operand that decides
how large a result is, or how often something is done, must not come from an input's elements.
What comes from `Shape` and `Size` does not. Operators that repeat bodies are out, and so are those
that read amounts out of data; of an If both bodies must keep the rule. Results whose size elements
decide within that of the inputs (NonZero, Compress, TopK) are fine.
"""

from collections.abc import Iterator
from typing import Any

# Raised with every change of the rule or the tables: plans hold what was found by them.
RULES = 1

# The newest operator sets that the tables were held against.
VERSIONS_MAX = {"": 28, "ai.onnx": 28, "ai.onnx.ml": 5}

_ALL = range(64)  # every input of the operator

DECIDE: dict[str, tuple[int, ...] | range] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (1,),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": _ALL,
    "OneHot": (1,),
    "Pad": (1,),
    "Range": _ALL,
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Tile": (1, 2),
    "Upsample": (1,),
}
# Bodies that are repeated, a compressed image, and regions that are sampled the finer the larger
# they are.
REFUSED = frozenset({"ImageDecoder", "Loop", "RoiAlign", "Scan", "SequenceMap"})
_SHAPES = frozenset({"Shape", "Size"})


def sized_by_shapes(model: Any) -> bool:
    """Whether the rule holds. `model`: a ModelProto."""
    if model.functions:  # operators of the file's own
        return False
    for opset in model.opset_import:
        if opset.version > VERSIONS_MAX.get(opset.domain, opset.version):
            return False
    return _keeps_rule(model.graph, set(), {value.name for value in model.graph.input})


def _keeps_rule(graph: Any, known: set[str], from_inputs: set[str]) -> bool:
    """known: names from around the graph, from_inputs: those, here as well, that hold elements of
    the inputs. Of what is not understood, such as a file whose nodes are out of order: no."""
    known = known | from_inputs | {tensor.name for tensor in graph.initializer}
    known.update(tensor.values.name for tensor in graph.sparse_initializer)
    from_inputs = set(from_inputs)
    for node in graph.node:
        if node.domain not in VERSIONS_MAX or node.op_type in REFUSED:
            return False
        if not known.issuperset(name for name in node.input if name):
            return False
        deciding = DECIDE.get(node.op_type, ())
        if any(name in from_inputs for i, name in enumerate(node.input) if i in deciding):
            return False
        bodies = list(_bodies(node))
        if bodies and node.op_type != "If":
            return False
        if not all(_keeps_rule(body, known, from_inputs) for body in bodies):
            return False
        known.update(node.output)
        if node.op_type not in _SHAPES and (bodies or not from_inputs.isdisjoint(node.input)):
            from_inputs.update(node.output)
    return True


def _bodies(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
