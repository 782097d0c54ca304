# SPDX-License-Identifier: Apache-2.0
"""The form of plans that are ours: what engines load in one piece, and what they must know of it.

Bytes: a line that names the kind, the length of the header in 8 bytes (little endian), the header
in JSON, then parts one after the other.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from thirdrail_engines.engine import ModelFileError

_LENGTH_BYTES = 8
_HEADER_BYTES_MAX = 16 << 20
_COPY_BYTES = 1 << 20


def write_plan_file(
    path: Path, kind: bytes, header: Mapping[str, object], parts: Sequence[Path]
) -> None:
    """A new file. Raises OSError."""
    text = json.dumps(header).encode()
    with path.open("xb") as file:
        file.write(kind + len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, file, _COPY_BYTES)


def read_plan_file(
    name: str, data: bytes | memoryview, kind: bytes, maker: str
) -> tuple[Any, memoryview]:
    """The header, whatever JSON it is, and a view of all parts.

    name: of the model, and maker: who writes plans of this kind, for errors.
    Raises ModelFileError for data of another kind.
    """
    view = memoryview(data)
    start = len(kind) + _LENGTH_BYTES
    if bytes(view[: len(kind)]) != kind or view.nbytes < start:
        raise ModelFileError(f"{name}: its plan is none that {maker} made")
    header_bytes = int.from_bytes(view[len(kind) : start], "little")
    with checking_header(name):
        if header_bytes > _HEADER_BYTES_MAX:
            raise ValueError
        header = json.loads(bytes(view[start : start + header_bytes]))
    return header, view[start + header_bytes :]


@contextlib.contextmanager
def checking_header(name: str) -> Iterator[None]:
    """Turns what a wrong header leads to into ModelFileError."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ModelFileError(f"{name}: its plan has a damaged header") from None
