# SPDX-License-Identifier: Apache-2.0
"""What an ONNX file declares, as far as TensorRT passes over it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from thirdrail_engines.plans import BuildError, BuildFault

# ONNX's element types that both plans and requests can have.
_DTYPES = ("BOOL", "UINT8", "INT8", "INT32", "INT64", "FLOAT16", "BFLOAT16", "FLOAT")


@dataclass(frozen=True, slots=True)
class Declared:
    """dtypes: of inputs and outputs, in ONNX's words. conditionals: the names of If nodes."""

    dtypes: Mapping[str, str]
    conditionals: tuple[str, ...]

    def dtype_fault(self) -> str:
        """Why the inputs and outputs cannot be a plan's, or nothing.

        TensorRT's parser makes FP32 of DOUBLE without a word: another model, for its callers.
        """
        for name, dtype in self.dtypes.items():
            if dtype not in _DTYPES:
                return (
                    f"'{name}' has elements of type {dtype}, which a TensorRT plan cannot have; "
                    f"expected one of {', '.join(_DTYPES)}"
                )
        return ""


def read_declared(source: Path) -> Declared:
    """Raises BuildError: MISSING for no file, REFUSED for one that is no ONNX model."""
    try:
        model = onnx.load(source, load_external_data=False)
    except OSError as error:
        raise BuildError(BuildFault.MISSING, f"{source.name}: {error.strerror}") from None
    except DecodeError:
        raise BuildError(BuildFault.REFUSED, f"{source.name}: not a readable ONNX file") from None
    type_name = onnx.TensorProto.DataType.Name
    return Declared(
        {
            value.name: type_name(value.type.tensor_type.elem_type)
            for value in (*model.graph.input, *model.graph.output)
        },
        tuple(node.name for node in model.graph.node if node.op_type == "If"),
    )
