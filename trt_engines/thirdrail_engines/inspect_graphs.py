# SPDX-License-Identifier: Apache-2.0
"""The child process that reads ONNX graphs: `python -m thirdrail_engines.inspect_graphs`.

Standard input: one JSON object {"path": ...} a line. Standard output: one line for each, in order,
{"positional_inputs": [...], "unranked": [...], "sized_by_shapes": ...} or {"error": ...}. It ends
with its input, hence with its parent.

A process of its own, because parsing a model takes a multiple of its size in memory and holds the
GIL.
"""

import json
import sys
from typing import Any

import onnx

from thirdrail_engines.amounts import sized_by_shapes
from thirdrail_engines.positions import positional_inputs


def inspect(path: str) -> dict[str, Any]:
    """What ONNX Runtime's Python interface does not say. Weights in other files stay unread."""
    return look_at(onnx.load(path, load_external_data=False))


def look_at(model: Any) -> dict[str, Any]:
    """The same for a ModelProto."""
    values = (*model.graph.input, *model.graph.output)
    return {
        "positional_inputs": positional_inputs(model),
        "unranked": [value.name for value in values if not _has_rank(value)],
        "sized_by_shapes": sized_by_shapes(model),
    }


def _has_rank(value: Any) -> bool:
    return bool(value.type.tensor_type.HasField("shape"))


def main() -> None:
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            answer = inspect(json.loads(line)["path"])
        except Exception as error:  # whatever the parser meets in a stranger's file is an answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
