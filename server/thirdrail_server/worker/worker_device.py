# SPDX-License-Identifier: Apache-2.0
"""The device that a worker was told to run engines on. Not yet run on a GPU.

The worker sees no other: the front starts it with CUDA_VISIBLE_DEVICES, so that every library that
looks for a device finds this one.
"""

import logging
import time

from thirdrail_engines import cuda_engines
from thirdrail_engines.cuda.device import Device
from thirdrail_engines.cuda.errors import CudaError
from thirdrail_engines.plans import BuildError

_log = logging.getLogger(__name__)


class WorkerDevice:
    """Safe to use from several threads. uuid: empty for the CPU."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._device: Device | None = None

    def opened(self) -> Device | None:
        """None where there is none, which is logged: engines that need it then say so."""
        if not self._uuid:
            return None
        try:
            self._device = cuda_engines.own_device(self._uuid)
        except (BuildError, CudaError) as error:
            _log.error("the device of this worker cannot be used: %s", error)
            return None
        return self._device

    def shared_bytes(self) -> int:
        """What models compute in, none of them alone."""
        return self._device.activations.nbytes if self._device is not None else 0

    def check_runs(self) -> None:
        """Raises DeviceLost when a run has not ended in time."""
        if self._device is not None:
            self._device.runs.check(time.monotonic())

    def taken_bytes(self) -> int:
        """Of the device's memory, in its own figures, without what is shared; 0 where it does not
        tell."""
        device = self.opened()
        if device is None:
            return 0
        figures = device.memory()
        return figures.total_bytes - figures.free_bytes - self.shared_bytes()
