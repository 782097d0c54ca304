# SPDX-License-Identifier: Apache-2.0
"""A well-behaved client that calls all the time, while others do what they should not."""

import threading
import time

import numpy as np

from thirdrail import Client

BETWEEN_CALLS_S = 0.008
SIZES = (16, 1 << 16)  # inline, and by reference


class Neighbour:
    """Calls from `start` to `stop` on a thread; every call must give what was sent."""

    def __init__(self, url: str) -> None:
        self.client = Client(url, transport="lane")
        self.calls = 0
        self.failures: list[str] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="neighbour", daemon=True)
        for size in SIZES:  # its memory is there before anybody looks
            self._call(size)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._call(SIZES[self.calls % len(SIZES)])
            except Exception as error:
                self.failures.append(repr(error))
            self.calls += 1
            time.sleep(BETWEEN_CALLS_S)

    def _call(self, size: int) -> None:
        sent = np.full(size, self.calls, np.float32)
        received = self.client.infer("identity", sent, timeout=30)["y"]
        if not np.array_equal(received, sent):
            self.failures.append(f"call {self.calls}: {received}")

    def has_gone_on(self) -> None:
        """Another call succeeds from now on, and none has failed."""
        seen, deadline_s = self.calls, time.monotonic() + 30
        while self.calls < seen + 2 and time.monotonic() < deadline_s:
            time.sleep(BETWEEN_CALLS_S)
        assert self.calls >= seen + 2, "the neighbour gets no answers"
        assert not self.failures, self.failures

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self.client.close()
