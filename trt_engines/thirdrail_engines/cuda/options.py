# SPDX-License-Identifier: Apache-2.0
"""What a server decides about engines on a device."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """staging_bytes_max: of pinned host memory. graphs_max: per instance; 0 for none, also where
    the program records graphs by itself. open_output_bytes_max: of each open output of a run.
    run_s_max: see EngineSpec.
    """

    instances: int = 1
    overlapped_runs: int = 2  # of each instance
    staging_bytes_max: int = 256 << 20
    graphs_max: int = 32
    open_output_bytes_max: int = 1 << 30
    run_s_max: float = 60.0

    def __post_init__(self) -> None:
        if min(self.instances, self.overlapped_runs) < 1:
            raise ValueError(
                f"{self.instances} instances of {self.overlapped_runs} overlapped runs, expected "
                "at least 1 of each"
            )
        if not self.run_s_max > 0:
            raise ValueError(f"run_s_max is {self.run_s_max}, expected more than 0")
