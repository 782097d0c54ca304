# SPDX-License-Identifier: Apache-2.0
"""The first bytes of a plan: who built it, and for what.

Established from plans that TensorRT for RTX 1.4.0.76 and 1.7.1.116 built for each of its compute
capabilities, and for TensorRT from NVIDIA's trtexec, whose --getPlanVersionOnly reads the same
place (samples/common/sampleEngines.cpp). Little endian:

    0  4 bytes  "vtrt": TensorRT for RTX; "ftrt": TensorRT
   16  8 bytes  TensorRT for RTX: the size of the whole plan
   24  4 bytes  version: major, minor, patch, build
   32  4 bytes  TensorRT for RTX: one bit for each compute capability
"""

import struct
from dataclasses import dataclass

from thirdrail_engines.plans import Builder

_BUILDERS = {b"vtrt": Builder.TENSORRT_RTX, b"ftrt": Builder.TENSORRT}
_CAPABILITY_BITS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")

HEADER_BYTES = 36


@dataclass(frozen=True, slots=True)
class PlanHeader:
    builder: Builder
    version: str
    capabilities: tuple[str, ...] = ()  # () for TensorRT, which keeps them elsewhere
    plan_bytes: int | None = None  # None for TensorRT, likewise


def read_header(plan: bytes | memoryview) -> PlanHeader | None:
    """plan: all of it or its first HEADER_BYTES. Returns None for what does not begin as a plan."""
    start = bytes(plan[:HEADER_BYTES])
    builder = _BUILDERS.get(start[:4])
    if builder is None or len(start) < HEADER_BYTES:
        return None
    version = ".".join(str(number) for number in start[24:28])
    if builder is Builder.TENSORRT:
        return PlanHeader(builder, version)
    plan_bytes, bits = struct.unpack_from("<16xQ8xI", start)
    return PlanHeader(builder, version, _names(bits), plan_bytes)


def _names(bits: int) -> tuple[str, ...]:
    named = [name for index, name in enumerate(_CAPABILITY_BITS) if bits & 1 << index]
    if bits >> len(_CAPABILITY_BITS):
        named.append("others")  # that are newer than this table
    return tuple(named)
