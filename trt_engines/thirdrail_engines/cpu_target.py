# SPDX-License-Identifier: Apache-2.0
"""Which CPU a plan belongs to.

One of ONNX Runtime, by the instruction sets that its kernels ask for. Code of a compiler that may
use all there is, by all that the system names.
"""

import hashlib
import platform
from pathlib import Path

# As Linux writes them in /proc/cpuinfo.
_X86 = (
    "sse4_1 avx f16c fma avx2 avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 "
    "avx512_fp16 amx_tile amx_int8 amx_bf16"
)
_ARM = "asimd asimdhp fphp asimddp i8mm bf16 sve sve2 svei8mm svebf16 sme sme2"


def cpu_target() -> str:
    """For PlanRequest.target: "x86_64 avx avx2 fma ..."; the architecture alone where the system
    does not tell the rest."""
    asked_for = {*_X86.split(), *_ARM.split()}
    return " ".join([platform.machine(), *sorted(_flags(_cpuinfo()) & asked_for)])


def native_target() -> str:
    """For PlanRequest.target of code that is compiled for exactly this CPU and C library: the same
    words, and a digest of all the CPU's features."""
    digest = hashlib.sha256(" ".join(sorted(_flags(_cpuinfo()))).encode()).hexdigest()
    return f"{cpu_target()}, all features {digest[:16]}, {' '.join(platform.libc_ver())}"


def _flags(cpuinfo: str) -> frozenset[str]:
    """What all cores have: they need not be of one kind."""
    lines = [line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]
    cores = [frozenset(line.partition(":")[2].split()) for line in lines]
    return frozenset.intersection(*cores) if cores else frozenset()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
