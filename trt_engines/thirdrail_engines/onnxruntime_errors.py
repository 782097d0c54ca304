# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's error texts, without places in its source, our folders and status codes."""

import re
from pathlib import Path

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
