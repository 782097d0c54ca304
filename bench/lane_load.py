# SPDX-License-Identifier: Apache-2.0
"""Load by our own blocking client, from this process: one thread, so many calls in flight."""

import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from bench.measure import Slice, as_latencies
from thirdrail import Client

RunSlice = Callable[[float], Slice]


def timed(action: Callable[[], Any], tidy: Callable[[], Any] | None = None) -> RunSlice:
    """Slices of one action after another. tidy: what belongs to it but is not timed."""

    def run(seconds: float) -> Slice:
        latencies: list[int] = []
        cpu_s, started = time.process_time(), time.perf_counter()
        while time.perf_counter() - started < seconds:
            began = time.perf_counter_ns()
            action()
            latencies.append(time.perf_counter_ns() - began)
            if tidy is not None:
                tidy()
        elapsed = time.perf_counter() - started
        return Slice(as_latencies(latencies), elapsed, time.process_time() - cpu_s)

    return run


def windowed(client: Client, model: str, inputs: Any, in_flight: int) -> RunSlice:
    """Slices of calls of which so many are always in flight. A latency is the time from
    a call's start until its result was taken."""

    def run(seconds: float) -> Slice:
        latencies: list[int] = []
        waiting: deque[tuple[int, Any]] = deque()
        cpu_s, started = time.process_time(), time.perf_counter()
        while time.perf_counter() - started < seconds or waiting:
            while len(waiting) < in_flight and time.perf_counter() - started < seconds:
                waiting.append((time.perf_counter_ns(), client.submit(model, inputs)))
            began, future = waiting.popleft()
            future.result()["y"]
            latencies.append(time.perf_counter_ns() - began)
        elapsed = time.perf_counter() - started
        return Slice(as_latencies(latencies), elapsed, time.process_time() - cpu_s)

    return run


def raw_windowed(sock: socket.socket, packet: bytes, in_flight: int) -> RunSlice:
    """The same for bare packets."""

    def run(seconds: float) -> Slice:
        latencies: list[int] = []
        waiting: deque[int] = deque()
        cpu_s, started = time.process_time(), time.perf_counter()
        while time.perf_counter() - started < seconds or waiting:
            while len(waiting) < in_flight and time.perf_counter() - started < seconds:
                waiting.append(time.perf_counter_ns())
                sock.send(packet)
            sock.recv(len(packet))
            latencies.append(time.perf_counter_ns() - waiting.popleft())
        elapsed = time.perf_counter() - started
        return Slice(as_latencies(latencies), elapsed, time.process_time() - cpu_s)

    return run
