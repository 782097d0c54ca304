# SPDX-License-Identifier: Apache-2.0
"""Streams, events and graphs of a device on the CUDA driver API. Not yet run on a GPU."""

from typing import TYPE_CHECKING, Any

from thirdrail_engines.cuda.device import Event, Graph

if TYPE_CHECKING:
    from thirdrail_engines.cuda.driver import DriverDevice


class DriverEvent:
    """See Event. is_shared: another process can open it."""

    def __init__(self, device: "DriverDevice", *, is_shared: bool = False) -> None:
        self._device = device
        flags = device.names.CUevent_flags
        # Blocking: a thread that spins takes a core from those that have something to do.
        wanted = flags.CU_EVENT_DISABLE_TIMING | flags.CU_EVENT_BLOCKING_SYNC
        if is_shared:
            wanted |= flags.CU_EVENT_INTERPROCESS
        self.native: Any = device.call("cuEventCreate", wanted)

    @property
    def handle(self) -> int:
        return int(self.native)

    def is_done(self) -> bool:
        self._device.make_current()
        (code,) = self._device.names.cuEventQuery(self.native)
        if code == self._device.names.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if code:
            raise self._device.error(code, "cuEventQuery")
        return True

    def wait(self) -> None:
        self._device.call("cuEventSynchronize", self.native)

    def close(self) -> None:
        self._device.call("cuEventDestroy", self.native)


class DriverGraph:
    """See Graph."""

    def __init__(self, device: "DriverDevice", captured: Any) -> None:
        self._device = device
        try:
            self.native: Any = device.call("cuGraphInstantiate", captured, 0)
        finally:
            device.call("cuGraphDestroy", captured)

    def close(self) -> None:
        self._device.call("cuGraphExecDestroy", self.native)


class DriverStream:
    """See Stream."""

    def __init__(self, device: "DriverDevice") -> None:
        self._device = device
        # Non-blocking: the legacy default stream, which libraries may use, does not join it.
        flags = device.names.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.native: Any = device.call("cuStreamCreate", flags)

    @property
    def handle(self) -> int:
        return int(self.native)

    def copy_in(self, target: int, source: int, nbytes: int) -> None:
        self._device.call("cuMemcpyHtoDAsync", target, source, nbytes, self.native)

    def copy_out(self, target: int, source: int, nbytes: int) -> None:
        self._device.call("cuMemcpyDtoHAsync", target, source, nbytes, self.native)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._device.call("cuMemcpyDtoDAsync", target, source, nbytes, self.native)

    def fill(self, target: int, nbytes: int, value: int = 0) -> None:
        self._device.call("cuMemsetD8Async", target, value, nbytes, self.native)

    def record(self, event: Event) -> None:
        assert isinstance(event, DriverEvent)
        self._device.call("cuEventRecord", event.native, self.native)

    def wait(self, event: Event) -> None:
        assert isinstance(event, DriverEvent)
        self._device.call("cuStreamWaitEvent", self.native, event.native, 0)

    def begin_capture(self) -> None:
        # Thread-local: what other threads do with the device meanwhile does not disturb it.
        mode = self._device.names.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._device.call("cuStreamBeginCapture", self.native, mode)

    def end_capture(self) -> DriverGraph:
        return DriverGraph(self._device, self._device.call("cuStreamEndCapture", self.native))

    def launch(self, graph: Graph) -> None:
        assert isinstance(graph, DriverGraph)
        self._device.call("cuGraphLaunch", graph.native, self.native)

    def synchronize(self) -> None:
        self._device.call("cuStreamSynchronize", self.native)

    def close(self) -> None:
        self._device.call("cuStreamDestroy", self.native)
