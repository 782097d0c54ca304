# SPDX-License-Identifier: Apache-2.0
"""The test vectors in docs/lane.md: a packet in hexadecimal, and what it means.

A block is a line with the direction and a name, the packet, a line with three dashes, and the
message in protobuf's text format. `python -m support.vectors` (in tests/) writes the packets anew
from their meanings.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format

from thirdrail.v1 import lane_pb2

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "lane.md"

_BYTES_PER_LINE = 32
_BLOCK = re.compile(
    r"^```text\n(?P<direction>[<>]) (?P<name>[^\n]+)\n(?P<packet>[0-9a-f \n]*?)---\n"
    r"(?P<meaning>.*?)^```$",
    re.M | re.S,
)

Message = lane_pb2.LaneRequest | lane_pb2.LaneResponse


@dataclass(frozen=True, slots=True)
class Vector:
    name: str
    is_request: bool
    packet: bytes
    message: Message  # what the text says

    def decoded(self) -> Message:
        """What the packet says."""
        return type(self.message).FromString(self.packet)


def vectors_in(markdown: str) -> dict[str, Vector]:
    found = [_vector(match) for match in _BLOCK.finditer(markdown)]
    return {vector.name: vector for vector in found}


def _vector(match: re.Match[str]) -> Vector:
    is_request = match["direction"] == ">"
    message = _message(match)
    return Vector(match["name"], is_request, bytes.fromhex(match["packet"]), message)


def _message(match: re.Match[str]) -> Message:
    kind = lane_pb2.LaneRequest if match["direction"] == ">" else lane_pb2.LaneResponse
    return text_format.Parse(match["meaning"], kind())


def rewritten(markdown: str) -> str:
    """The document with every packet made from its meaning."""

    def block(match: re.Match[str]) -> str:
        packet = _message(match).SerializeToString(deterministic=True)
        lines = [
            packet[at : at + _BYTES_PER_LINE].hex(" ")
            for at in range(0, len(packet), _BYTES_PER_LINE)
        ]
        head = f"```text\n{match['direction']} {match['name']}\n"
        return f"{head}{chr(10).join(lines)}\n---\n{match['meaning']}```"

    return _BLOCK.sub(block, markdown)


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text()))
