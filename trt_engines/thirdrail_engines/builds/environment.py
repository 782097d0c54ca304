# SPDX-License-Identifier: Apache-2.0
"""The environment variables of a build: those that are needed, never all but the secret ones."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

# Finding programs and libraries, the language of messages, and which GPUs there are.
_KEPT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONHOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
)


def build_environment(
    ours: Mapping[str, str], import_path: Iterable[str], home: Path
) -> dict[str, str]:
    """import_path: sys.path, so that the child finds the packages that we run from, however they
    were found. home: a folder of the build's own, for caches and temporary files also."""
    kept = {name: ours[name] for name in _KEPT if name in ours}
    return {
        **kept,
        "HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONPATH": os.pathsep.join(entry for entry in import_path if os.path.isabs(entry)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",  # its last words are wanted
        "ORT_DISABLE_TELEMETRY": "1",
    }
