# SPDX-License-Identifier: Apache-2.0
"""How the client connects: the gRPC options, TLS and compression of a channel."""

import functools
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import grpc

from thirdrail._version import __version__
from thirdrail.errors import InvalidArgument

Compression = Literal["gzip"]


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """PEM files for a server that speaks TLS. Raises InvalidArgument for half a client certificate.

    ca: whom to trust; none: the certificate authorities that gRPC brings along.
    cert, key: the client's own, for servers that ask for one.
    server_name: the name expected in the server's certificate, where it is not that of the address.
    """

    ca: str | PathLike[str] | None = None
    cert: str | PathLike[str] | None = None
    key: str | PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InvalidArgument("a client certificate needs both cert and key, got one of them")


OPTIONS: tuple[tuple[str, str | int], ...] = (
    # The server has the limit, and its refusal names it.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # The server is on this host; an http_proxy of the environment is not meant for it.
    ("grpc.enable_http_proxy", 0),
    # Connections are shared process-wide by default, and a forked child would go on with its
    # parent's.
    ("grpc.use_local_subchannel_pool", 1),
    # A local server that restarts is back within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.primary_user_agent", f"thirdrail-python/{__version__}"),
)


def open_channel(
    address: str, tls: TlsOptions | None, compression: grpc.Compression | None
) -> grpc.Channel:
    """A blocking channel to a gRPC target; connects on the first call."""
    _keep_grpc_up()
    if tls is None:
        return grpc.insecure_channel(address, options=OPTIONS, compression=compression)
    return grpc.secure_channel(
        address, _credentials(tls), options=_options(tls), compression=compression
    )


def open_aio_channel(
    address: str, tls: TlsOptions | None, compression: grpc.Compression | None
) -> grpc.aio.Channel:
    """The same channel for asyncio."""
    _keep_grpc_up()
    if tls is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS, compression=compression)
    return grpc.aio.secure_channel(
        address, _credentials(tls), options=_options(tls), compression=compression
    )


@functools.cache
def _keep_grpc_up() -> grpc.Channel:
    """A channel that is never used and never closed.

    When its last channel is closed, gRPC's core shuts down on a thread of its own, and a child that
    is forked meanwhile has the locks that this thread held: it hangs when it connects. Seen after 2
    to 4 of 100 such forks on a busy host with grpcio 1.85, and after none of 800 with this channel.
    """
    return grpc.insecure_channel("unix:/nobody")


def grpc_compression(compression: Compression | None) -> grpc.Compression | None:
    """gRPC's constant. Raises InvalidArgument for another name."""
    if compression is None:
        return None
    if compression != "gzip":
        raise InvalidArgument(f"unknown compression {compression!r}, expected 'gzip' or None")
    return grpc.Compression.Gzip


def _credentials(tls: TlsOptions) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(_read(tls.ca), _read(tls.key), _read(tls.cert))


def _options(tls: TlsOptions) -> tuple[tuple[str, str | int], ...]:
    if tls.server_name is None:
        return OPTIONS
    return (*OPTIONS, ("grpc.ssl_target_name_override", tls.server_name))


def _read(path: str | PathLike[str] | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
