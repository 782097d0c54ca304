# SPDX-License-Identifier: Apache-2.0
"""A torch.export archive becomes an ExportedProgram, with names and types for its tensors.

Imports torch.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export.graph_signature import SymBoolArgument, SymFloatArgument, SymIntArgument
from torch.utils import _pytree as pytree

from thirdrail import dtypes
from thirdrail.dtypes import DType
from thirdrail.tensors import TensorSpec
from thirdrail_engines.torch_sources.archive import Kind, kind_of
from thirdrail_engines.torch_sources.quiet import quiet_exporter
from thirdrail_engines.torch_sources.reading import read_program, refusal, tidy

DTYPES: dict[torch.dtype, DType] = {
    torch.bool: dtypes.BY_NAME["BOOL"],
    torch.uint8: dtypes.BY_NAME["UINT8"],
    torch.uint16: dtypes.BY_NAME["UINT16"],
    torch.uint32: dtypes.BY_NAME["UINT32"],
    torch.uint64: dtypes.BY_NAME["UINT64"],
    torch.int8: dtypes.BY_NAME["INT8"],
    torch.int16: dtypes.BY_NAME["INT16"],
    torch.int32: dtypes.BY_NAME["INT32"],
    torch.int64: dtypes.BY_NAME["INT64"],
    torch.float16: dtypes.BY_NAME["FP16"],
    torch.bfloat16: dtypes.BY_NAME["BF16"],
    torch.float32: dtypes.BY_NAME["FP32"],
    torch.float64: dtypes.BY_NAME["FP64"],
}


@dataclass(frozen=True, slots=True)
class Exported:
    """A program, and its tensors in the order in which it takes and returns them.

    outputs: with the place of each among all that the program returns.
    constants: what is no tensor among these, in words, with its place. The rest is None.
    changed: buffers and inputs that a run writes to.
    """

    program: Any  # torch.export.ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[tuple[int, TensorSpec], ...]
    constants: tuple[tuple[int, str], ...]
    changed: tuple[str, ...]


def load_exported(path: Path) -> Exported:
    """Read a `.pt2` file. Raises BuildError when it is none, is damaged, or cannot be served."""
    if kind_of(path) is not Kind.EXPORTED:
        raise refusal(path, "a TorchScript file: name it model.pt")
    program = read_program(path)
    inputs = tuple(_inputs(path, program))
    outputs = tuple(_outputs(path, program, {spec.name for spec in inputs}))
    return Exported(
        program, inputs, outputs, tuple(_constants(program)), tuple(_changed(path, program))
    )


def changes_itself(names: Iterable[str]) -> str:
    """Why a program with state is not served: runs would see each other, in any order."""
    listed = ", ".join(f"'{name}'" for name in names)
    return (
        f"each run changes {listed}; one request would then change the results of the next. Call "
        "model.eval() before it is exported, let it work on copies of its inputs (x.clone()), and "
        "make state an input and an output"
    )


def _inputs(path: Path, program: Any) -> Iterable[TensorSpec]:
    for node in _user_inputs(program):
        if not isinstance(node.meta.get("val"), torch.Tensor):
            raise refusal(
                path,
                f"input '{node.name}' is no tensor: give the model its numbers when it is exported",
            )
        yield _spec(path, node.name, node.meta["val"])


def _user_inputs(program: Any) -> Iterable[Any]:
    """The nodes of what the caller passes: not those of constants among the arguments."""
    names = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind.name == "USER_INPUT" and not hasattr(spec.arg, "value")
    }
    return (n for n in program.graph.nodes if n.op == "placeholder" and n.name in names)


def _outputs(path: Path, program: Any, taken: set[str]) -> Iterable[tuple[int, TensorSpec]]:
    names = _output_names(program.call_spec.out_spec, taken)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    found = False
    for place, (argument, name) in enumerate(zip(_returned(program), names, strict=True)):
        value = values.get(getattr(argument, "name", ""))
        if isinstance(value, torch.Tensor):
            found = True
            yield place, _spec(path, name, value)
    if not found:
        raise refusal(path, "no output is a tensor")


def _constants(program: Any) -> Iterable[tuple[int, str]]:
    for place, argument in enumerate(_returned(program)):
        if isinstance(argument, SymIntArgument | SymFloatArgument | SymBoolArgument):
            yield place, "a number made of sizes"
        elif getattr(argument, "value", None) is not None:
            yield place, f"always {argument.value!r}"


def _changed(path: Path, program: Any) -> Iterable[str]:
    """What a run writes to and others see.

    A saved program still has its in-place operators. Made functional, it tells which of them reach
    beyond its own intermediate values.
    """
    if any(_is_in_place(node) for node in program.graph.nodes):
        try:
            with quiet_exporter():
                program = program.run_decompositions({})
        except Exception as error:  # its parts raise whatever they happen to
            raise refusal(path, f"PyTorch cannot make it functional: {tidy(error)}") from None
    signature = program.graph_signature
    yield from signature.buffers_to_mutate.values()
    yield from signature.user_inputs_to_mutate.values()


def _is_in_place(node: Any) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _returned(program: Any) -> list[Any]:
    specs = program.graph_signature.output_specs
    return [spec.arg for spec in specs if spec.kind.name == "USER_OUTPUT"]


def _output_names(tree: Any, taken: set[str]) -> Sequence[str]:
    """The words that the model's author used: dictionary keys and field names, else numbers.

    A name that an input has already gets "_out" behind it: ONNX knows one value by one name.
    """
    leaves = list(range(tree.num_leaves))
    paths = [p for p, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(leaves, tree))[0]]
    names: list[str] = []
    for path in paths:
        words = [_word(step) for step in path]
        if not words or words[0].isdigit():
            words.insert(0, "output")
        name = re.sub(r"\W", "_", "_".join(words))
        while name in taken or name in names:  # ends: each round makes the name longer
            name += "_out"
        names.append(name)
    return names


def _word(step: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(step, attribute):
            return str(getattr(step, attribute))
    return str(step)


def _spec(path: Path, name: str, value: Any) -> TensorSpec:
    dtype = DTYPES.get(value.dtype)
    if dtype is None:
        expected = ", ".join(row.name for row in DTYPES.values())
        raise refusal(
            path,
            f"tensor '{name}' is a {value.dtype}, expected one of {expected}: convert it in the "
            "model (complex numbers with torch.view_as_real and torch.view_as_complex)",
        )
    if dtype.numpy is None:
        raise refusal(path, f"tensor '{name}' is BF16: install ml_dtypes")
    return TensorSpec(name, dtype, tuple(d if isinstance(d, int) else -1 for d in value.shape))
