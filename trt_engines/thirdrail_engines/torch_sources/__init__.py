# SPDX-License-Identifier: Apache-2.0
"""Models in PyTorch's formats. torch is imported late: only by what really reads such a file.

A `.pt2` or `.pt` file is code: whoever may write one may run what he likes in the process that
opens it. What is refused here (pickled objects, compiled libraries) narrows that; it does not end
it. docs/torch.md says what is trusted.
"""

from thirdrail_engines.torch_sources.archive import Kind, kind_of
from thirdrail_engines.torch_sources.to_onnx import to_onnx

__all__ = ["Kind", "kind_of", "to_onnx"]
