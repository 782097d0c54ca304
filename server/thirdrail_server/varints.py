# SPDX-License-Identifier: Apache-2.0
"""Reading the numbers between the fields of a serialized message, for those who go around protobuf.

The form is protobuf's (https://protobuf.dev/programming-guides/encoding); `lane.packets` writes it.
"""


class NotUnderstood(Exception):
    """These bytes are left to protobuf, which knows what to say about them."""


def varint_at(view: memoryview, position: int, end: int) -> tuple[int, int]:
    """The number at a position, and where it ends. Raises NotUnderstood."""
    value = shift = 0
    while position < end and shift < 64:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise NotUnderstood
