# SPDX-License-Identifier: Apache-2.0
"""What every benchmark is given."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """seconds: of load for each contender in each setting. folder: for sockets, logs and models.

    is_twin: on the twin of a device, for a benchmark that needs a GPU.
    """

    seconds: float
    folder: Path
    is_twin: bool = False
