# SPDX-License-Identifier: Apache-2.0
"""What a server decides about engines on a device."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """staging_bytes_max: of pinned host memory. graphs_max: per instance; 0 for none, also where
    the program records graphs by itself. open_output_bytes_max: of each open output of a run.
    """

    instances: int = 1
    overlapped_runs: int = 2  # of each instance
    staging_bytes_max: int = 256 << 20
    graphs_max: int = 32
    open_output_bytes_max: int = 1 << 30

    def __post_init__(self) -> None:
        if min(self.instances, self.overlapped_runs) < 1:
            raise ValueError(
                f"{self.instances} instances of {self.overlapped_runs} overlapped runs, expected "
                "at least 1 of each"
            )
