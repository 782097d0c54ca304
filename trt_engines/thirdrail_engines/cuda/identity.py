# SPDX-License-Identifier: Apache-2.0
"""Which device: by UUID, never by ordinal.

An ordinal depends on CUDA_VISIBLE_DEVICES, on the order that the driver chose and on who looks. A
UUID names one GPU, or one MIG instance of it, in every process and every container.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from thirdrail_engines.plans import BuildError, BuildFault

# As nvidia-smi -L and CUDA_VISIBLE_DEVICES write them. There too, a unique beginning is enough.
_NAME = re.compile(r"(?:(GPU|MIG)-)?([0-9a-f][0-9a-f-]{0,35})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What does not change about a device while the machine is up.

    uuid: with its prefix, GPU- or MIG-.
    driver: the newest CUDA version that the driver offers, as (13, 0).
    """

    uuid: str
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    driver: tuple[int, int]

    @property
    def is_mig(self) -> bool:
        return self.uuid.startswith("MIG-")

    @property
    def capability_name(self) -> str:
        """As plans are built for: "sm86"."""
        major, minor = self.compute_capability
        return f"sm{major}{minor}"


def uuid_text(octets: bytes, device_name: str) -> str:
    """The UUID that the driver gave, as people write it.

    The driver answers with a MIG instance's own UUID, and says in the name alone that it is one:
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb". Raises ValueError unless there are 16 octets.
    """
    kind = "MIG" if " MIG " in f"{device_name} " else "GPU"
    return f"{kind}-{UUID(bytes=octets)}"


def choose_device(wanted: str, found: Sequence[DeviceFacts]) -> DeviceFacts:
    """The device that `wanted` names: a UUID, with or without its prefix, or a unique beginning of
    one. "" is the only device there is.

    Raises BuildError MISSING, with the UUIDs to choose from.
    """
    if not found:
        raise BuildError(BuildFault.MISSING, "no CUDA device is here")
    there = ", ".join(f"{facts.uuid} ({facts.name})" for facts in found)
    if not wanted:
        if len(found) == 1:
            return found[0]
        raise BuildError(
            BuildFault.MISSING, f"{len(found)} CUDA devices are here, name one by UUID: {there}"
        )
    named = _NAME.fullmatch(wanted)
    if named is None or (len(wanted) < 4 and wanted.isdecimal()):
        raise BuildError(
            BuildFault.MISSING,
            f"{wanted[:80]!a} names no device: expected a UUID, an ordinal means another device to "
            f"every process. There is: {there}",
        )
    kind, octets = named.group(1) or "", named.group(2).lower()
    fitting = [
        facts
        for facts in found
        if facts.uuid[4:].startswith(octets) and facts.uuid.startswith(kind.upper())
    ]
    if len(fitting) == 1:
        return fitting[0]
    what = "no CUDA device" if not fitting else f"{len(fitting)} CUDA devices"
    raise BuildError(BuildFault.MISSING, f"{what} of the UUID {wanted!a}. There is: {there}")
