# SPDX-License-Identifier: Apache-2.0
"""What works between this process and a server, found by trying, and how fast it is here.

The server says what it offers; each offer is then tried with the same two round trips: one without
a tensor and one that carries PAYLOAD_BYTES there and back.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from thirdrail.channels import TlsOptions, open_channel
from thirdrail.errors import ThirdrailError
from thirdrail.failures import rpc_errors
from thirdrail.lane import attach
from thirdrail.transport import CannotAttach
from thirdrail.v1 import sessions_pb2 as pb
from thirdrail.v1 import sessions_pb2_grpc

MIB = 1 << 20
PAYLOAD_BYTES = MIB
ROUND_TRIPS = 300
TENSOR_ROUND_TRIPS = 100
MEASURE_S_MAX = 2.0  # a slow transport is measured with fewer round trips
WARM_UP_ROUND_TRIPS = 5
CALL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Times:
    """Of round trips, in microseconds."""

    p50_us: float
    p99_us: float
    count: int


@dataclass(frozen=True, slots=True)
class TransportFinding:
    """offered: by the server. works: here. reason: why not. Nothing is measured that fails, nor
    what a client of ours does not use."""

    name: str
    offered: bool
    works: bool
    reason: str
    address: str
    round_trip: Times | None = None
    tensor: Times | None = None  # with PAYLOAD_BYTES there and back
    mib_per_s: float | None = None  # the payload's size by the median of `tensor`


@dataclass(frozen=True, slots=True)
class MemoryFinding:
    """What this process does with the lane's memory: what in-place filling and reading costs."""

    write_mib_per_s: float
    read_mib_per_s: float


@dataclass(frozen=True, slots=True)
class Findings:
    address: str
    server_version: str
    payload_bytes: int
    transports: tuple[TransportFinding, ...]
    memory: MemoryFinding | None  # None without the lane


def probe_server(address: str, channel: grpc.Channel, tls: TlsOptions | None) -> Findings:
    """channel: to `address`.

    Raises Unreachable when nobody is there, TimedOut when nobody answers, Unimplemented for a
    server without Probe.
    """
    service = sessions_pb2_grpc.SessionsStub(channel)
    with rpc_errors(address, CALL_TIMEOUT_S):
        answer = service.Probe(pb.ProbeRequest(), timeout=CALL_TIMEOUT_S)
    findings: list[TransportFinding] = []
    memory = None
    for offer in answer.transports:
        if not offer.offered:
            findings.append(TransportFinding(offer.name, False, False, offer.reason, ""))
        elif offer.name == "lane":
            finding, memory, others = _probe_lane(offer, address, service)
            findings.append(finding)
            for worker in others:
                findings.append(_probe_lane(offer, address, service, worker)[0])
        elif offer.name in ("grpc-unix", "grpc-tcp"):
            findings.append(_probe_grpc(offer, address, tls))
        elif offer.name == "lane-cuda":
            findings.append(_probe_device(offer))
        else:
            findings.append(TransportFinding(offer.name, True, True, "", offer.address))
    return Findings(address, answer.server_version, PAYLOAD_BYTES, tuple(findings), memory)


def _probe_grpc(offer: pb.Transport, ours: str, tls: TlsOptions | None) -> TransportFinding:
    """By the address that we were given if it is of this kind: the server's own may not be ours."""
    is_unix = offer.name == "grpc-unix"
    address = ours if ours.startswith("unix:") == is_unix else offer.address
    try:
        with open_channel(address, None if is_unix else tls, None) as channel:
            service = sessions_pb2_grpc.SessionsStub(channel)
            with rpc_errors(address, CALL_TIMEOUT_S):
                return _measured(
                    offer.name,
                    address,
                    lambda: service.Probe(pb.ProbeRequest(), timeout=CALL_TIMEOUT_S),
                    lambda: service.Probe(
                        pb.ProbeRequest(payload=bytes(PAYLOAD_BYTES)), timeout=CALL_TIMEOUT_S
                    ),
                )
    except ThirdrailError as error:
        return TransportFinding(offer.name, True, False, str(error), address)


def _probe_device(offer: pb.Transport) -> TransportFinding:
    """Whether this process could use it: nothing is asked of the device."""
    from thirdrail.device.cuda_runtime import load_driver

    try:
        load_driver()
    except ThirdrailError as error:
        return TransportFinding(offer.name, True, False, str(error), offer.address)
    return TransportFinding(offer.name, True, True, "", offer.address)


def _probe_lane(
    offer: pb.Transport, address: str, service: sessions_pb2_grpc.SessionsStub, worker: str = ""
) -> tuple[TransportFinding, MemoryFinding | None, Sequence[str]]:
    """To one worker, by default the server's first; the others are told as well."""
    name, others = f"lane to {worker}" if worker else "lane", tuple[str, ...]()
    try:
        attach.check_platform()
        from thirdrail.lane.ping import PingLane  # its memory exists on Linux alone

        try:
            request = pb.OpenSessionRequest(worker=worker)
            opened = service.OpenSession(request, timeout=attach.OPEN_TIMEOUT_S)
        except grpc.RpcError as error:
            raise attach.cannot_open(error, address) from None
        others = tuple(opened.workers[1:])
        sock = attach.connect(address, opened)
        where = os.fsdecode(sock.getpeername())
        with PingLane(sock, opened.token) as lane:
            memory = lane.open_input(PAYLOAD_BYTES)
            finding = _measured(name, where, lane.ping, lambda: lane.echo(PAYLOAD_BYTES))
            return finding, _measured_memory(memory, lane.echo(PAYLOAD_BYTES)), others
    except CannotAttach as why:
        return TransportFinding(name, True, False, why.reason, offer.address), None, others
    except ThirdrailError as error:
        return TransportFinding(name, True, False, str(error), offer.address), None, others


def _measured(
    name: str, address: str, small: Callable[[], object], large: Callable[[], object]
) -> TransportFinding:
    round_trip, tensor = _timed(small, ROUND_TRIPS), _timed(large, TENSOR_ROUND_TRIPS)
    rate = PAYLOAD_BYTES / MIB / tensor.p50_us * 1e6
    return TransportFinding(name, True, True, "", address, round_trip, tensor, rate)


def _measured_memory(inputs: memoryview, outputs: memoryview) -> MemoryFinding:
    ours = np.ones(PAYLOAD_BYTES, np.uint8)
    write = _timed(lambda: np.copyto(np.frombuffer(inputs, np.uint8), ours), TENSOR_ROUND_TRIPS)
    read = _timed(lambda: np.copyto(ours, np.frombuffer(outputs, np.uint8)), TENSOR_ROUND_TRIPS)
    rates = [PAYLOAD_BYTES / MIB / times.p50_us * 1e6 for times in (write, read)]
    return MemoryFinding(*rates)


def _timed(act: Callable[[], object], count: int) -> Times:
    for _ in range(WARM_UP_ROUND_TRIPS):
        act()
    took_us: list[float] = []
    ends_at_s = time.perf_counter() + MEASURE_S_MAX
    while len(took_us) < count:
        began_s = time.perf_counter()
        act()
        ended_s = time.perf_counter()
        took_us.append((ended_s - began_s) * 1e6)
        if ended_s >= ends_at_s:
            break
    p50, p99 = np.percentile(took_us, (50, 99))
    return Times(float(p50), float(p99), len(took_us))
