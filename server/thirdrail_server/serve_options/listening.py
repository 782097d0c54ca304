# SPDX-License-Identifier: Apache-2.0
"""Where the server listens."""

from pathlib import Path
from typing import Annotated

import typer

from thirdrail_server.config import TlsFiles
from thirdrail_server.serve_options.panel import in_panel

option = in_panel("Listening")

Address = Annotated[str, option("Where to listen on TCP.", "--address", metavar="HOST:PORT")]
Socket = Annotated[
    Path | None,
    option(
        "The Unix socket to listen on. \\[default: where clients look]",
        "--socket",
    ),
]
NoTcp = Annotated[bool, option("Listen on the Unix socket only.", "--no-tcp")]
NoSocket = Annotated[bool, option("Listen on TCP only.", "--no-socket")]
TlsCert = Annotated[
    Path | None,
    option("Certificate chain (PEM) for TLS on TCP.", "--tls-cert"),
]
TlsKey = Annotated[Path | None, option("Its private key (PEM).", "--tls-key")]
TlsClientCa = Annotated[
    Path | None,
    option(
        "Demand client certificates of this authority (mTLS).",
        "--tls-client-ca",
    ),
]


def tls_files(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise typer.BadParameter("TLS needs both --tls-cert and --tls-key")
    return TlsFiles(cert, key, client_ca)


def default_socket() -> Path:
    from thirdrail.discovery import default_socket_path

    return default_socket_path()
