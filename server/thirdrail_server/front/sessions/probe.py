# SPDX-License-Identifier: Apache-2.0
"""The answer to Sessions.Probe: the payload back, and which transports this server offers.

Pure. Whether a transport works between these two processes only the caller can find out: it knows
what it can reach. `thirdrail probe` puts both halves together.
"""

from thirdrail._version import __version__
from thirdrail.v1 import sessions_pb2 as pb
from thirdrail_server.config import ServerConfig

NO_UNIX_SOCKET = "the server has no Unix socket (--socket PATH)"
NO_TCP = "the server does not listen on TCP (--address HOST:PORT)"
NO_DEVICE_MEMORY = "device memory is not handed over by this version; {}"
NO_CLIENT_SHM = "the server maps no memory that clients name (--allow-client-shm)"


def answer_probe(
    request: pb.ProbeRequest,
    config: ServerConfig,
    *,
    tcp_address: str | None,
    lane_address: str,
    why_no_lane: str,
    has_client_shm: bool,
    device_sharing: str,
) -> pb.ProbeResponse:
    """tcp_address: with its real port; None without TCP.

    lane_address: the lane's socket, in the server's own view.
    why_no_lane: empty where OpenSession would give a place, else the words of its refusal.
    has_client_shm: whether KServe's system shared memory is on.
    device_sharing: how memory of this host's devices could be shared, or why it cannot.
    """
    unix = f"unix:{config.socket}" if config.socket is not None else ""
    return pb.ProbeResponse(
        payload=request.payload,
        transports=(
            _transport("lane", lane_address, why_no_lane),
            _transport("grpc-unix", unix, "" if unix else NO_UNIX_SOCKET),
            _transport("grpc-tcp", tcp_address or "", "" if tcp_address else NO_TCP),
            _transport("kserve-shared-memory", "", "" if has_client_shm else NO_CLIENT_SHM),
            _transport("lane-cuda", "", NO_DEVICE_MEMORY.format(device_sharing)),
        ),
        server_version=__version__,
    )


def _transport(name: str, address: str, why_not: str) -> pb.Transport:
    if why_not:
        return pb.Transport(name=name, reason=why_not)
    return pb.Transport(name=name, offered=True, address=address)
