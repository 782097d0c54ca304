# SPDX-License-Identifier: Apache-2.0
"""Where the front listens: TCP, with or without TLS, and a Unix socket in a folder of its own."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from thirdrail_server.config import ConfigError, ServerConfig, TlsFiles

KEEPALIVE_MIN_PING_MS = 10_000
# A connection may have so many more streams than calls are allowed: at its own bound a client waits
# in silence, at ours it is told.
REFUSED_STREAMS_MAX = 64


def channel_options(config: ServerConfig) -> list[tuple[str, Any]]:
    """gRPC's settings for every listener."""
    return [
        ("grpc.max_receive_message_length", config.message_bytes_max),
        ("grpc.max_send_message_length", config.message_bytes_max),
        ("grpc.max_concurrent_streams", config.concurrent_calls_max + REFUSED_STREAMS_MAX),
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
        _listen_unix(server, config.socket)
    return bound


def _listen_tcp(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> str:
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, _credentials(tls))
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {address}: the port is taken, or the address is not this host's"
        ) from None
    host, _, _ = address.rpartition(":")
    return f"{host}:{port}"


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    pair = (_read(tls.key, "TLS key"), _read(tls.certificate, "TLS certificate"))
    if tls.client_ca is None:
        return grpc.ssl_server_credentials([pair])
    ca = _read(tls.client_ca, "client CA")
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=True)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the {what} '{path}' cannot be read: {error.strerror}") from None


def _listen_unix(server: grpc.aio.Server, path: Path) -> None:
    """gRPC would silently take over the socket of a running server, so look before it binds."""
    if len(os.fsencode(path)) > 107:
        raise ConfigError(f"the socket's path is longer than 107 bytes: '{path}'")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.parent):
            if _is_answered(path):
                raise ConfigError(f"another server listens on '{path}'")
            path.unlink(missing_ok=True)
            before = os.umask(0o177)
            try:
                server.add_insecure_port(f"unix:{path}")
            finally:
                os.umask(before)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"cannot listen on the socket '{path}': {error}") from None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Servers that start at the same time look and bind one after the other."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True
