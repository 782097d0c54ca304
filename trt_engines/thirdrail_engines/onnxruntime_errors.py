# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's error texts, without places in its source, our folders and status codes.

Who is to blame for a run that fails follows from where it failed, not from the exception's class:
of kernels that refuse what they were given, some raise InvalidArgument, more of them Fail, those
that leave it to C++ RuntimeException, and with an I/O binding all of them Python's RuntimeError.
Graph and weights are the same in every run, and went through ONNX Runtime's own checks when they
were loaded. So what a kernel refuses is the inputs' fault, as far as anybody can tell: a model that
no input pleases says so to each. What fails outside of kernels is ours, since names, types and
shapes of inputs were compared with the model's before, and so is an output in the wrong place.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from thirdrail.tensors import Array
from thirdrail_engines.engine import EngineError, EngineInputError, EngineMemoryError

_TEXT_CHARS_MAX = 1000

_STATUS = re.compile(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
_PREFIX = re.compile(
    r"(?:Error in execution: |Load model from .*? failed: ?|Exception during \w+: )"
)
_NODE = re.compile(
    r"Non-zero status code returned while running (\S+) node\. Name:'(.*?)' Status Message: ?"
)
_SOURCE = re.compile(r"(?:/\S*/)?[\w.-]+\.(?:cc|cpp|h|hpp|inc):\d+ ")
_AFTER_SIGNATURE = re.compile(
    r"(?: const)?(?: \[with [^\]]*\])?(?:::<lambda\(.*?\)>)?(?: mutable)?\s*"
)
_NO_MEMORY = ("std::bad_alloc", "Failed to allocate memory")
# Of ONNX Runtime 1.31, and of older ones.
_WRONG_PLACE = ("output OrtValue provided for output", "OrtValue shape verification failed")
_NO_NUMBER = re.compile(r"\bsto(?:d|f|i|l|ll|ul|ull)$")  # C++'s, which say no more than their names
_INPUTS_NAMED_MAX = 8


def run_failure(error: Exception, inputs: Mapping[str, Array]) -> EngineError:
    """What to raise for a run that failed. inputs: of this run, for their shapes."""
    message = str(error)
    text = tidy(message).removesuffix(":")  # behind which some say nothing
    if not _NODE.search(message) or any(words in message for words in _WRONG_PLACE):
        return EngineError(text)
    if any(words in message for words in _NO_MEMORY):
        return EngineMemoryError(f"no memory for a run with {_shapes(inputs)}: {text}")
    text = _NO_NUMBER.sub("a text is no number, or one out of range", text)
    return EngineInputError(f"the model cannot compute with {_shapes(inputs)}: {text}")


def _shapes(inputs: Mapping[str, Array]) -> str:
    shapes = [f"'{name}' {list(array.shape)}" for name, array in inputs.items()]
    further = len(shapes) - _INPUTS_NAMED_MAX
    more = [f"{further} more"] if further > 0 else []
    return ", ".join(shapes[:_INPUTS_NAMED_MAX] + more) or "no inputs"


def tidy(message: str, folder: Path | None = None) -> str:
    """The part of an error text that its reader can use, on one line and bounded in length.

    folder: where the model lies; its path is left out of the text.
    """
    text = message
    if folder is not None:
        text = text.replace(f"{folder}/", "").replace(f"{folder.resolve()}/", "")
    text = _PREFIX.sub("", _STATUS.sub("", text))
    text = _NODE.sub(_node_name, text)
    text = _without_sources(text)
    text = " ".join(_STATUS.sub("", text).split())
    return text if len(text) <= _TEXT_CHARS_MAX else text[: _TEXT_CHARS_MAX - 3] + "..."


def _node_name(match: re.Match[str]) -> str:
    operator, name = match.groups()
    return f"{operator} node '{name}': " if name else f"{operator} node: "


def _without_sources(text: str) -> str:
    """Drop each "file.cc:12 return_type name(arguments) " or "file.cc:12 name "."""
    parts = []
    while match := _SOURCE.search(text):  # ends: each round consumes a match
        parts.append(text[: match.start()])
        is_signature = match.group().startswith("/")
        text = _after_signature(text[match.end() :], is_signature=is_signature)
    return "".join([*parts, text])


def _after_signature(text: str, *, is_signature: bool) -> str:
    if not is_signature:  # ONNX Runtime's own short form: a bare function name
        return text.partition(" ")[2]
    start = text.find("(")
    depth = 0
    for index in range(start, len(text)) if start >= 0 else ():
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0 and text[index + 1 : index + 2] != "(":  # as behind the name "operator()"
            after = text[index + 1 :]
            match = _AFTER_SIGNATURE.match(after)
            return after[match.end() :] if match else after
    return text
