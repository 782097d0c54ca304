# SPDX-License-Identifier: Apache-2.0
"""The answer to Sessions.Probe: the payload back, and which transports this server offers.

Pure. Whether a transport works between these two processes only the caller can find out: it knows
what it can reach. `thirdrail probe` puts both halves together.
"""

from collections.abc import Mapping

from thirdrail._version import __version__
from thirdrail.v1 import sessions_pb2 as pb
from thirdrail_engines.cuda.sharing import How, Sharing
from thirdrail_server.config import ServerConfig

NO_UNIX_SOCKET = "the server has no Unix socket (--socket PATH)"
NO_TCP = "the server does not listen on TCP (--address HOST:PORT)"
NO_DEVICE_WORKER = "no worker of this server computes on a device"
NO_CLIENT_SHM = "the server maps no memory that clients name (--allow-client-shm)"


def answer_probe(
    request: pb.ProbeRequest,
    config: ServerConfig,
    *,
    tcp_address: str | None,
    lane_address: str,
    why_no_lane: str,
    has_client_shm: bool,
    devices: Mapping[str, Sharing],
    why_no_device: str,
) -> pb.ProbeResponse:
    """tcp_address: with its real port; None without TCP.

    lane_address: the lane's socket, in the server's own view.
    why_no_lane: empty where OpenSession would give a place, else the words of its refusal.
    has_client_shm: whether KServe's system shared memory is on.
    devices: how each device's memory is shared with clients of the server's user, by UUID; of those
        that a worker computes on.
    why_no_device: where there are none.
    """
    unix = f"unix:{config.socket}" if config.socket is not None else ""
    return pb.ProbeResponse(
        payload=request.payload,
        transports=(
            _transport("lane", lane_address, why_no_lane),
            _transport("grpc-unix", unix, "" if unix else NO_UNIX_SOCKET),
            _transport("grpc-tcp", tcp_address or "", "" if tcp_address else NO_TCP),
            _transport("kserve-shared-memory", "", "" if has_client_shm else NO_CLIENT_SHM),
            _devices(devices, why_no_lane or why_no_device or NO_DEVICE_WORKER),
        ),
        server_version=__version__,
    )


def _devices(devices: Mapping[str, Sharing], why_none: str) -> pb.Transport:
    """Which mechanism, and why not one that would be better."""
    told = "; ".join(f"{uuid}: {sharing}" for uuid, sharing in devices.items())
    if any(sharing.how is How.VIRTUAL_MEMORY for sharing in devices.values()):
        return _transport("lane-cuda", told, "")
    return _transport("lane-cuda", "", told or why_none)


def _transport(name: str, address: str, why_not: str) -> pb.Transport:
    if why_not:
        return pb.Transport(name=name, reason=why_not)
    return pb.Transport(name=name, offered=True, address=address)
