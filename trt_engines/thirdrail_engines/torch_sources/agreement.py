# SPDX-License-Identifier: Apache-2.0
"""The proof that an ONNX file computes what its PyTorch program does, on its own examples.

Everything later is compared with the ONNX file, so it must be right itself. Imports torch.
"""

from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from thirdrail.tensors import Array
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.onnxruntime_errors import tidy
from thirdrail_engines.onnxruntime_session import open_session
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.output_figures import OutputFigures, compare
from thirdrail_engines.torch_sources.exported import Exported

# Both compute in the same precision, in sums of another order. A wrong operator is far beyond.
REL_MAX = {"FP16": 2e-2}
REL_MAX_DEFAULT = 1e-3
EQUAL_MIN = 0.99  # of whole numbers: a choice between equals may fall either way


def disagreement(exported: Exported, onnx_path: Path) -> str:
    """What is different, or nothing; nothing, too, when there is no way to compare.

    That is so without examples in the archive, and for BF16, which ONNX Runtime's plain interface
    does not pass.
    Raises ModelFileError when ONNX Runtime cannot load the file, and what torch raises when the
    program fails.
    """
    examples = exported.program.example_inputs
    specs = (*exported.inputs, *(spec for _, spec in exported.outputs))
    if examples is None or any(spec.dtype.name == "BF16" for spec in specs):
        return ""
    positional, named = examples
    with torch.inference_mode():
        returned = pytree.tree_leaves(exported.program.module()(*positional, **named))
    tensors = [leaf for leaf in pytree.tree_leaves(examples) if isinstance(leaf, torch.Tensor)]
    session = open_session(onnx_path, EngineOptions())
    feed = {
        spec.name: _array_of(tensor) for spec, tensor in zip(exported.inputs, tensors, strict=True)
    }
    for place, spec in exported.outputs:
        try:
            (result,) = session.run([spec.name], feed)
        except Exception as error:  # ONNX Runtime's own share no parent but Exception
            raise ModelFileError(tidy(str(error))) from None
        figures = compare(spec.name, result, _array_of(returned[place]))
        fault = _fault(figures, REL_MAX.get(spec.dtype.name, REL_MAX_DEFAULT))
        if fault:
            return f"output '{spec.name}' {fault}"
    return ""


def _array_of(tensor: Any) -> Array:
    array: Array = tensor.detach().cpu().contiguous().numpy()
    return array


def _fault(figures: OutputFigures, rel_max: float) -> str:
    if figures.fault:
        return figures.fault
    if figures.not_finite:
        return f"has {figures.not_finite} elements that are NaN or infinite in one of them only"
    if figures.equal < EQUAL_MIN:
        return f"has the same value in {figures.equal:.1%} of its elements only"
    if figures.max_rel > rel_max:
        return f"differs by {figures.max_rel:.2g} of its largest value, at most {rel_max:.2g}"
    return ""
