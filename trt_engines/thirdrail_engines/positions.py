# SPDX-License-Identifier: Apache-2.0
"""Which inputs of an ONNX graph may be read in place, from memory that others can still write.

The danger. A caller's input lies in memory that the caller maps writable, and nothing can stop it
from writing there while the engine runs. A kernel that reads an element, checks it and reads it
again, or that uses it as an index, a shape, a count or a condition, can then be led outside its
buffers. A kernel that reads every element at an address which only shapes decide, and computes
with it, cannot: a changed element changes a number in the caller's own result, and nothing else.
Such a kernel reads *by position*.

The rule. An input is positional when all of these hold:

1. it holds floats. Whole numbers, booleans and strings are what indices, shapes and conditions are
   made of;
2. it has no default value in the file, so that nothing can have been optimised for its contents;
3. each use of it is by a node of the standard operator set, at an input that the tables name;
4. no body of an If, Loop or Scan captures it by name.

Two tables, because the reading ends at some nodes and goes on at others. READERS write a result of
their own that no optimisation replaces by their input: what follows them sees private memory.
FOLLOWED may hand on the very memory they were given, since a runtime lets a Reshape share its
input's buffer, and removes an Identity, a Cast to the same type, an Add of zero. For those, the
same question is asked of every use of their results.

An input may be a result of the graph, directly or through such nodes: results are copies (the
contract suite tests it), and a copy reads by position. Anything not in a table, or not understood,
is not positional, which costs one copy of the input for each request and nothing else.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

# Raised with every change of the rule or the tables: plans hold what was found by them.
RULES = 1

FLOAT_TYPES = frozenset({1, 10, 11, 16})  # TensorProto: FLOAT, FLOAT16, DOUBLE, BFLOAT16
STANDARD_DOMAINS = frozenset({"", "ai.onnx"})

_ALL = None  # every input of the operator
_FIRST = frozenset({0})

_Table = dict[str, frozenset[int] | None]


def _table(*rows: tuple[frozenset[int] | None, str]) -> _Table:
    return {operator: inputs for inputs, operators in rows for operator in operators.split()}


# Sums and products over windows, rows and channels. Left out on purpose: TopK, Unique and
# NonMaxSuppression (a comparison sort over changing values may run past its buffer), GridSample
# and RoiAlign (values are coordinates), ArgMax, ArgMin and NonZero (their results are positions).
READERS: _Table = _table(
    (_ALL, "Conv ConvTranspose MatMul Gemm"),
    (_FIRST, "AveragePool MaxPool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool"),
    (_ALL, "BatchNormalization InstanceNormalization LayerNormalization GroupNormalization"),
    (_ALL, "RMSNormalization"),
    (_FIRST, "LpNormalization MeanVarianceNormalization LRN Softmax LogSoftmax"),
    (_FIRST, "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2"),
    (_FIRST, "ReduceLogSum ReduceLogSumExp ReduceSumSquare"),
    # Not the lengths at 4; the weights at 1 to 3 are constants in practice and were not reviewed.
    (frozenset({0, 5, 6}), "LSTM"),
    (frozenset({0, 5}), "GRU RNN"),
    (_FIRST, "QuantizeLinear DynamicQuantizeLinear"),
    (_FIRST, "Shape Size"),  # read no element at all
)

# Views, moves and element-wise arithmetic. Where an operator also takes indices, shapes, scales or
# conditions, only the inputs that hold data are named.
FOLLOWED: _Table = _table(
    (_FIRST, "Identity Dropout Cast CastLike Flatten Reshape Squeeze Unsqueeze Transpose"),
    (_FIRST, "Slice Split Expand Tile Gather GatherElements GatherND Resize Upsample"),
    (_FIRST, "DepthToSpace SpaceToDepth Trilu CumSum"),
    (frozenset({0, 2}), "Pad ScatterElements ScatterND"),
    (frozenset({1, 2}), "Where"),
    (_ALL, "Concat Sum Mean Max Min Add Sub Mul Div Pow Mod PRelu Clip"),
    (_FIRST, "Neg Abs Sqrt Reciprocal Exp Log Sign Floor Ceil Round Erf IsNaN IsInf"),
    (_FIRST, "Sin Cos Tan Asin Acos Atan Sinh Cosh Tanh Asinh Acosh Atanh"),
    (_FIRST, "Relu LeakyRelu ThresholdedRelu Elu Celu Selu Gelu Mish Swish Shrink"),
    (_FIRST, "Sigmoid HardSigmoid HardSwish Softplus Softsign"),
    (_ALL, "Greater GreaterOrEqual Less LessOrEqual Equal"),
)


def positional_inputs(model: Any) -> list[str]:
    """Names of the inputs that the rule above lets be bound in place. `model`: a ModelProto."""
    graph = model.graph
    if any(function.domain in STANDARD_DOMAINS for function in model.functions):
        return []  # the file redefines standard operators: their names promise nothing
    constants = {tensor.name for tensor in graph.initializer}
    constants.update(tensor.values.name for tensor in graph.sparse_initializer)
    uses = _uses(graph)
    captured = set(_captured(graph))
    return [
        value.name
        for value in graph.input
        if value.type.tensor_type.elem_type in FLOAT_TYPES
        and value.name not in constants
        and _is_positional(value.name, uses, captured)
    ]


def _is_positional(name: str, uses: dict[str, list[tuple[Any, int]]], captured: set[str]) -> bool:
    seen = {name}
    pending = [name]
    while pending:  # ends: every name of the graph enters once
        current = pending.pop()
        if current in captured:
            return False
        for node, index in uses[current]:
            if node.domain not in STANDARD_DOMAINS:
                return False
            if _names(READERS, node.op_type, index):
                continue
            if not _names(FOLLOWED, node.op_type, index):
                return False
            fresh = [output for output in node.output if output and output not in seen]
            seen.update(fresh)
            pending.extend(fresh)
    return True


def _names(table: _Table, operator: str, index: int) -> bool:
    if operator not in table:
        return False
    inputs = table[operator]
    return inputs is None or index in inputs


def _uses(graph: Any) -> dict[str, list[tuple[Any, int]]]:
    """Per name: the nodes of the graph itself that read it, and at which of their inputs."""
    uses: dict[str, list[tuple[Any, int]]] = defaultdict(list)
    for node in graph.node:
        for index, name in enumerate(node.input):
            uses[name].append((node, index))
    return uses


def _captured(graph: Any) -> Iterator[str]:
    """Every name in a body below the graph. A body's own names are among them: the safe side."""
    pending = [body for node in graph.node for body in _bodies(node)]
    while pending:  # ends: bodies are a tree in the file
        body = pending.pop()
        yield from (output.name for output in body.output)
        for node in body.node:
            yield from node.input
            pending.extend(_bodies(node))


def _bodies(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
