# SPDX-License-Identifier: Apache-2.0
"""Device memory for a result whose size only the run tells. It grows, and is kept for the next."""

from thirdrail_engines.cuda.device import Device
from thirdrail_engines.engine import EngineError
from thirdrail_engines.plans import Shape


class GrowingOutput:
    """See OpenOutput. One run at a time; `begin` comes before each."""

    def __init__(self, device: Device, bytes_max: int) -> None:
        self._device = device
        self._bytes_max = bytes_max
        self._bytes = 0
        self.address = 0
        self.shape: Shape = ()
        self.is_told = False
        self.fault: Exception | None = None

    def begin(self) -> None:
        self.is_told = False
        self.fault = None

    def reserve(self, nbytes: int) -> int:
        if nbytes <= self._bytes:
            return self.address
        try:
            self._grow(nbytes)
        except EngineError as error:
            self.fault = error
            return 0
        return self.address

    def tell(self, shape: Shape) -> None:
        self.shape = tuple(shape)
        self.is_told = True

    def close(self) -> None:
        if self.address:
            self._device.free(self.address)
            self.address = self._bytes = 0

    def _grow(self, nbytes: int) -> None:
        if nbytes > self._bytes_max:
            raise EngineError(f"takes {nbytes} bytes, at most {self._bytes_max} are allowed")
        self.close()
        # Half as much again, so that slowly growing results do not stop the device each time.
        size = min(self._bytes_max, nbytes + nbytes // 2)
        self.address = self._device.allocate(size)
        self._bytes = size
