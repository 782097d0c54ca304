# SPDX-License-Identifier: Apache-2.0
"""Which files an ONNX model keeps weights in, found without parsing the model.

Only the messages that can hold a tensor are walked, and of the small ones only those with the word
in them that an external weight cannot do without; everything else is skipped by its length. So the
cost grows with the number of nodes and not with the bytes. The field numbers are those of
onnx.proto3 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3), the encoding is
https://protobuf.dev/programming-guides/encoding/.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from thirdrail_engines.engine import ModelFileError

_DEPTH_MAX = 100  # as protobuf has it
_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5

# For each message: which of its fields lead to tensors, and what they are.
_WALK: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_KEY, _VALUE = 1, 2  # of an Entry (StringStringEntryProto)
_LOCATION = b"location"

_WINDOW_BYTES = 1 << 16
_VARINT_BYTES_MAX = 10
_PLACE_BYTES_MAX = 4096
_SEARCHED_BYTES_MAX = 4096


def weights_beside(source: Path) -> list[str]:
    """The places of external weights, relative to the source's folder, in order, each once.

    None for anything but an .onnx file. Raises ModelFileError when the file cannot be read, is no
    protobuf message, or names a place outside its folder.
    """
    if source.suffix != ".onnx":
        return []
    try:
        with source.open("rb") as file:
            data = _Bytes(file.fileno())
            found = sorted(set(_locations(data, 0, data.size, "Model", 0)))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ModelFileError(f"cannot read {source}: {reason}") from None
    except ValueError:
        raise ModelFileError(f"{source} is not an ONNX model: its encoding is broken") from None
    for place in found:
        _check_inside(source, place)
    return found


def _check_inside(source: Path, place: str) -> None:
    path = PurePosixPath(place)
    if not place or path.is_absolute() or ".." in path.parts or "\0" in place:
        raise ModelFileError(
            f"{source} keeps weights in '{place}', expected a file in the model's own folder"
        )


class _Bytes:
    """A file's bytes by position. Read and not mapped: a mapping of a file that somebody cuts short
    kills its reader."""

    def __init__(self, fd: int) -> None:
        self.size = os.fstat(fd).st_size
        self._fd = fd
        self._window = b""
        self._from = 0

    def at(self, position: int, count: int) -> bytes:
        """Up to `count` bytes, fewer only at the end of the file."""
        start = position - self._from
        if not 0 <= start <= len(self._window) - count:
            self._window = os.pread(self._fd, max(count, _WINDOW_BYTES), position)
            self._from = position
            start = 0
        return self._window[start : start + count]


def _locations(data: _Bytes, at: int, end: int, kind: str, depth: int) -> Iterator[str]:
    """The values of all entries `location` of external_data in the message at [at, end)."""
    if depth > _DEPTH_MAX:
        raise ValueError("too deep")
    walk = _WALK[kind]
    for number, start, stop in _fields(data, at, end):
        inner = walk.get(number)
        if inner == "Entry":
            entry = {n: _text(data, a, b) for n, a, b in _fields(data, start, stop)}
            if entry.get(_KEY) == _LOCATION.decode():
                yield entry.get(_VALUE, "")
        elif inner is not None and _may_name_a_place(data, start, stop):
            yield from _locations(data, start, stop, inner, depth + 1)


def _may_name_a_place(data: _Bytes, start: int, stop: int) -> bool:
    """Whether a message has to be walked: the large ones have, without reading their weights."""
    size = stop - start
    return size > _SEARCHED_BYTES_MAX or _LOCATION in data.at(start, size)


def _text(data: _Bytes, start: int, stop: int) -> str:
    if stop - start > _PLACE_BYTES_MAX:
        raise ValueError("a file's place is too long")
    return data.at(start, stop - start).decode()


def _fields(data: _Bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of each length-delimited field. ValueError where there is nonsense."""
    while at < end:
        tag, at = _varint(data, at)
        if tag < 8:  # there is no field 0; a file that was cut short may be filled up with zeros
            raise ValueError("a field without a number")
        wire = tag & 7
        if wire == _LEN:
            length, at = _varint(data, at)
            yield tag >> 3, at, min(at + length, end)
            at += length
        elif wire == _VARINT:
            _, at = _varint(data, at)
        elif wire in (_I64, _I32):
            at += 8 if wire == _I64 else 4
        else:
            raise ValueError("groups and other wire types are no part of ONNX")
    if at != end:
        raise ValueError("a field ends after its message")


def _varint(data: _Bytes, at: int) -> tuple[int, int]:
    found = data.at(at, _VARINT_BYTES_MAX)
    if found and found[0] < 0x80:  # nearly all are
        return found[0], at + 1
    value = 0
    for index, byte in enumerate(found):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("a number does not end")
