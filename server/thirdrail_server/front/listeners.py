# SPDX-License-Identifier: Apache-2.0
"""Where the front listens: TCP, with or without TLS, and a Unix socket in a folder of its own."""

import errno
import os
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc

from thirdrail_server.config import ConfigError, ServerConfig, TlsFiles, host_and_port
from thirdrail_server.front.unix_sockets import bound_with, is_answered, locked, remove_left

KEEPALIVE_MIN_PING_MS = 10_000
# A connection may have so many more streams than calls are allowed: at its own bound a client waits
# in silence, at ours it is told.
REFUSED_STREAMS_MAX = 64
INT32_MAX = 2**31 - 1


def channel_options(config: ServerConfig) -> list[tuple[str, Any]]:
    """gRPC's settings for every listener."""
    streams_max = config.concurrent_calls_max + REFUSED_STREAMS_MAX
    calls_max = min(streams_max * config.connections_max, INT32_MAX)
    return [
        ("grpc.max_receive_message_length", config.message_bytes_max),
        ("grpc.max_send_message_length", config.message_bytes_max),
        ("grpc.max_concurrent_streams", streams_max),
        # Of calls that the front has not looked at yet gRPC drops some, from 1000 on, and their
        # callers hear "CANCELLED". The front answers all of them, within the other bounds here.
        ("grpc.server.max_pending_requests", calls_max),
        ("grpc.server.max_pending_requests_hard_limit", calls_max),
        ("grpc.max_allowed_incoming_connections", config.connections_max),
        # Two servers on one port would each get half of the calls, and neither would say so.
        ("grpc.so_reuseport", 0),
        # Clients may ping idle connections; without this they are hung up on ("too many pings").
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MIN_PING_MS),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.enable_channelz", int(config.channelz)),
    ]


def listen(server: grpc.aio.Server, config: ServerConfig) -> str | None:
    """Bind every listener. Returns the TCP address with its real port, None without TCP.

    Raises ConfigError when something cannot be bound: taken, forbidden, unreadable.
    """
    bound = None
    if config.address is not None:
        bound = _listen_tcp(server, config.address, config.tls)
    if config.socket is not None:
        _listen_unix(server, config.socket, socket_mode(config))
    return bound


def _listen_tcp(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> str:
    # gRPC says on standard error, in lines of its own, why it cannot listen, and not to us.
    host, port = host_and_port(address)
    reason = why_not_bindable(host.strip("[]"), port)
    if reason is not None:
        raise ConfigError(f"cannot listen on {address}: {reason}; choose another --address")
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, _credentials(tls))
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: {error}") from None
    return f"{host}:{port}"


def why_not_bindable(host: str, port: int) -> str | None:
    """Why a server cannot listen on TCP there, in the system's words; None if it can."""
    reasons: list[str] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return f"'{host}': {error.strerror}"
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(where)
        except OSError as error:
            reasons.append((error.strerror or str(error)).lower())
            if error.errno == errno.EADDRINUSE:
                return reasons[-1]
    # A name may stand for addresses of a family that this host does not have.
    return reasons[0] if len(reasons) == len(found) else None


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    pair = (_read(tls.key, "TLS key"), _read(tls.certificate, "TLS certificate"))
    ca = None if tls.client_ca is None else _read(tls.client_ca, "client CA")
    _check_pems(tls)
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


def _check_pems(tls: TlsFiles) -> None:
    """gRPC takes files that are no certificates, and then fails every handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    what = f"the TLS certificate '{tls.certificate}' with the key '{tls.key}'"
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")  # never ask for one
        if tls.client_ca is not None:
            what = f"the client CA '{tls.client_ca}'"
            context.load_verify_locations(tls.client_ca)
    except OSError as error:
        raise ConfigError(f"{what} cannot be used: {_ssl_reason(error)}") from None


def _ssl_reason(error: OSError) -> str:
    """ "key values mismatch", where OpenSSL says so."""
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return reason.replace("_", " ").lower() if reason else "not in PEM format"


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the {what} '{path}' cannot be read: {error.strerror}") from None


def socket_mode(config: ServerConfig) -> int:
    """Of both Unix sockets: its own user's alone, unless others may attach. Then the folder's mode
    says who reaches them, and the lane's list of uids who may attach."""
    uids = config.worker.sessions.uids
    return 0o600 if uids is not None and set(uids) <= {os.geteuid()} else 0o666


def _listen_unix(server: grpc.aio.Server, path: Path, mode: int) -> None:
    """gRPC would silently take over the socket of a running server, so look before it binds."""
    if len(os.fsencode(path)) > 107:
        raise ConfigError(f"the socket's path is longer than 107 bytes: '{path}'")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(path.parent):
            if is_answered(path, socket.SOCK_STREAM):
                raise ConfigError(
                    f"another server listens on '{path}'; choose another --socket, or --no-socket"
                )
            remove_left(path)
            with bound_with(mode):
                server.add_insecure_port(f"unix:{path}")
    except (OSError, RuntimeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(
            f"cannot listen on the socket '{path}': {reason}; choose another --socket, or "
            f"--no-socket"
        ) from None
