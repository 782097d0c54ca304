# SPDX-License-Identifier: Apache-2.0
"""A bound on the fields of a message, checked before protobuf makes objects of them.

Two bytes of a message can say "one more input", and become an object of a hundred bytes that is
looked at in Python. A message of 4 MiB, well within its bound, then takes 0.4 GiB and ten seconds
in which nobody else is served. So whatever is larger than that few fields can be is looked through
first: what has fields of its own is counted in depth, what merely holds elements is not. Tensor
elements are thus bounded by the message's size alone.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from thirdrail.dtypes import Buffer
from thirdrail.errors import InvalidArgument
from thirdrail_server.varints import NotUnderstood, varint_at

FIELDS_MAX = 4096
_FIELD_BYTES_MIN = 2

_VARINT, _FIXED64, _BYTES, _GROUP_START, _GROUP_END, _FIXED32 = range(6)
_PLAIN_BYTES = {_FIXED64: 8, _FIXED32: 4, _GROUP_START: 0, _GROUP_END: 0}
_NOT_PACKED = {
    FieldDescriptor.TYPE_STRING,
    FieldDescriptor.TYPE_BYTES,
    FieldDescriptor.TYPE_MESSAGE,
    FieldDescriptor.TYPE_GROUP,
}


def check_field_count(kind: Any, body: Buffer) -> None:
    """kind: a message's Descriptor.

    Raises InvalidArgument when a serialized message of this kind has more than FIELDS_MAX
    fields, those of its parts included. Numbers in a packed list that is not a tensor's elements
    count as well.
    """
    if len(body) <= _FIELD_BYTES_MIN * FIELDS_MAX:
        return
    try:
        count = _count(kind, memoryview(body), 0, len(body), 0)
    except NotUnderstood:
        return
    if count > FIELDS_MAX:
        raise InvalidArgument(
            f"a {kind.full_name} may have at most {FIELDS_MAX} fields, those of its parts included"
        )


def _count(kind: Descriptor, view: memoryview, position: int, end: int, count: int) -> int:
    """`count` and the fields between two positions; more than FIELDS_MAX are not counted on."""
    parts, packed = _parts(kind), _packed(kind)
    while position < end and count <= FIELDS_MAX:
        count += 1
        key, position = varint_at(view, position, end)
        wire_type = key & 7
        if wire_type == _VARINT:
            _, position = varint_at(view, position, end)
        elif wire_type == _BYTES:
            size, position = varint_at(view, position, end)
            if position + size > end:
                raise NotUnderstood
            number = key >> 3
            if number in parts:
                count = _count(parts[number], view, position, position + size, count)
            elif number in packed:
                count += size
            position += size
        elif wire_type in _PLAIN_BYTES:
            position += _PLAIN_BYTES[wire_type]
        else:
            raise NotUnderstood
    return count


@cache
def _parts(kind: Descriptor) -> Mapping[int, Descriptor]:
    """By number: the fields that are messages which hold messages themselves, and so can swarm."""
    return {
        field.number: field.message_type
        for field in kind.fields
        if field.message_type is not None and _holds_messages(field.message_type)
    }


def _holds_messages(kind: Descriptor) -> bool:
    return any(field.message_type is not None for field in kind.fields)


@cache
def _packed(kind: Descriptor) -> frozenset[int]:
    """The lists of numbers in a message that is looked through: shapes, for one."""
    return frozenset(
        field.number for field in kind.fields if _is_list(field) and field.type not in _NOT_PACKED
    )


def _is_list(field: Any) -> bool:
    if hasattr(field, "is_repeated"):
        return bool(field.is_repeated)
    return bool(field.label == FieldDescriptor.LABEL_REPEATED)  # protobuf before 6.31
