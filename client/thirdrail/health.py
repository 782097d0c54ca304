# SPDX-License-Identifier: Apache-2.0
"""The two messages of `grpc.health.v1.Health/Check`, written out by hand.

Their generated classes would register `grpc.health.v1` in the process, which other packages do as
well, and two registrations of one file can crash. Each message has a single field, so there is
little to write.
"""

CHECK_METHOD = "/grpc.health.v1.Health/Check"

SERVING = 1

_SERVICE_TAG = b"\x0a"  # HealthCheckRequest.service: field 1, length-delimited
_STATUS_TAG = 0x08  # HealthCheckResponse.status: field 1, a number


def encode_request(service: str) -> bytes:
    """`service`: a model's name, or empty for the whole server."""
    name = service.encode()
    return _SERVICE_TAG + _encode_varint(len(name)) + name if name else b""


def decode_response(data: bytes) -> int:
    """The ServingStatus: 0 unknown, 1 serving, 2 not serving. Raises ValueError for other bytes."""
    if not data:
        return 0
    if data[0] != _STATUS_TAG or len(data) != 2:
        raise ValueError(f"expected a HealthCheckResponse, got {data[:16]!r}")
    return data[1]


def _encode_varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
