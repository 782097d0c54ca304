# SPDX-License-Identifier: Apache-2.0
"""Large tensors out of and into serialized messages, without protobuf copying their bytes.

Protobuf copies a bytes field when it parses it, again when it is read, again when it is set and
again when it is serialized: four times 16 MiB for a large tensor and its answer. Here its place in
the message is found by reading the lengths on the way
(https://protobuf.dev/programming-guides/encoding), the small rest goes through protobuf as ever,
and the bytes are copied once, to where they are needed.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from thirdrail.dtypes import Buffer
from thirdrail.errors import InvalidArgument
from thirdrail.lane.packets import varint
from thirdrail_server.front.field_count import check_field_count
from thirdrail_server.varints import NotUnderstood, varint_at

M = TypeVar("M", bound=Message)
Large = Sequence[memoryview | None]  # per entry, its bytes where they were taken out

# Below it, protobuf's copies are cheaper than looking for a way around them.
LARGE_BYTES_MIN = 32 << 10

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}

Field = tuple[int, int, int, int]  # number, where it begins, where its payload begins, its end


def parsed(kind: type[M], body: bytes, came_bytes: int | None = None) -> M:
    """The message in `body`.

    came_bytes: the size of the whole message, if `body` is what `detach` left of it.
    Raises InvalidArgument when the bytes are no such message, or one of too many fields.
    """
    check_field_count(kind.DESCRIPTOR, body)
    try:
        return kind.FromString(body)
    except DecodeError:
        size = len(body) if came_bytes is None else came_bytes
        raise InvalidArgument(
            f"a message of {size} bytes is not a {kind.DESCRIPTOR.full_name}"
        ) from None


def detach(body: bytes, outer: int, inner: int | None) -> tuple[bytes, list[memoryview | None]]:
    """Take large bytes out of a serialized message.

    outer: the number of a repeated field of the message. inner: of the bytes field in each of its
    entries; None where the entries themselves are the bytes.
    Returns the message with empty bytes in their place, and per entry a view of what was taken,
    None where it was left in place. A message that makes no sense comes back as it is. It takes as
    long as the message has fields: `check_field_count` comes first.
    """
    view = memoryview(body)
    kept: list[Buffer] = []
    taken: list[memoryview | None] = []
    copied_to = 0
    try:
        for number, begin, payload, end in _fields(view, 0, len(body)):
            if number != outer:
                continue
            place = (payload, end) if inner is None else _only_bytes(view, payload, end, inner)
            if place is None or place[1] - place[0] < LARGE_BYTES_MIN:
                taken.append(None)
                continue
            taken.append(view[place[0] : place[1]])
            kept.append(view[copied_to:begin])
            kept.append(_emptied(view, outer, payload, end, place, inner))
            copied_to = end
    except NotUnderstood:
        return body, []
    if not kept:
        return body, taken
    return b"".join([*kept, view[copied_to:]]), taken


def _emptied(
    view: memoryview, outer: int, payload: int, end: int, place: tuple[int, int], inner: int | None
) -> bytes:
    """The entry without its bytes."""
    if inner is None:
        return _key(outer) + b"\0"
    # Between the inner field's key and its payload stands the length that is to become 0.
    before = place[0] - len(varint(place[1] - place[0]))
    entry = b"".join([view[payload:before], b"\0", view[place[1] : end]])
    return _key(outer) + varint(len(entry)) + entry


def _only_bytes(view: memoryview, begin: int, end: int, inner: int) -> tuple[int, int] | None:
    """Where an entry's bytes are, if the field comes once and its length in the shortest form.

    The caller checks what else the entry has: the bytes may be one choice of several.
    """
    found: tuple[int, int] | None = None
    for number, start, payload, stop in _fields(view, begin, end):
        if number == inner:
            if found is not None:
                return None
            found = (payload, stop)
            if payload - start != len(_key(inner)) + len(varint(stop - payload)):
                return None
    return found


def _fields(view: memoryview, begin: int, end: int) -> Iterator[Field]:
    position = begin
    while position < end:
        start = position
        key, position = varint_at(view, position, end)
        kind = key & 7
        payload = position
        if kind == _BYTES:
            size, payload = varint_at(view, position, end)
            position = payload + size
        elif kind == _VARINT:
            _, position = varint_at(view, position, end)
        elif kind in _FIXED_BYTES:
            position += _FIXED_BYTES[kind]
        else:
            raise NotUnderstood
        if position > end:
            raise NotUnderstood
        # Only length-delimited fields have a payload; others never match what is looked for.
        yield (key >> 3 if kind == _BYTES else 0), start, payload, position


def only_field(body: bytes, number: int) -> bytes | None:
    """The payload of a message's length-delimited field, if that is all the message holds.

    number: 1 to 15, whose keys take one byte.
    """
    if not body or body[0] != number << 3 | _BYTES:
        return None
    try:
        size, start = varint_at(memoryview(body), 1, len(body))
    except NotUnderstood:
        return None
    return body[start:] if start + size == len(body) else None


def bytes_field(number: int, *payload: Buffer) -> list[Buffer]:
    """A length-delimited field in pieces, to be joined with the rest of its message."""
    size = sum(memoryview(piece).nbytes for piece in payload)
    return [_key(number) + varint(size), *payload]


def joined(pieces: Sequence[Buffer]) -> bytes:
    """The message of these pieces: the one copy of its large bytes."""
    return b"".join(pieces)


def _key(number: int) -> bytes:
    return varint(number << 3 | _BYTES)
