# SPDX-License-Identifier: Apache-2.0
"""TLS both ways, with certificates made for the test."""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from support.echo import EchoServer
from thirdrail import Client, TlsOptions, Unreachable
from thirdrail.aio import AsyncClient
from thirdrail.errors import InvalidArgument
from thirdrail.failures import CHECK_TLS
from thirdrail.v1 import inference_pb2_grpc

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="needs the program openssl")

X = {"x": np.ones(2, np.float32)}


def write_certificate(folder: Path, name: str) -> None:
    """NAME.pem and NAME.key: signed by itself, valid for a day."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
    command += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj", f"/CN={name}"]
    command += ["-addext", f"subjectAltName=DNS:{name}"]
    command += ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("server", "client", "stranger"):
        write_certificate(folder, name)
    return folder


@pytest.fixture
def address(folder: Path, tmp_path: Path) -> Iterator[str]:
    """A server that demands the client's certificate."""
    pair = ((folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes())
    trusted = (folder / "client.pem").read_bytes()
    credentials: Any = grpc.ssl_server_credentials([pair], trusted, require_client_auth=True)
    server = grpc.server(ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServicer_to_server(EchoServer(tmp_path / "unused"), server)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def options(folder: Path, *, ca: str = "server", own: str | None = "client") -> TlsOptions:
    cert, key = (folder / f"{own}.pem", folder / f"{own}.key") if own else (None, None)
    return TlsOptions(folder / f"{ca}.pem", cert, key, server_name="server")


def test_both_sides_know_each_other(address: str, folder: Path) -> None:
    with Client(address, tls=options(folder)) as client:
        assert client.infer("echo", X)["x"].tolist() == [1, 1]

    async def call() -> Any:
        async with AsyncClient(address, tls=options(folder)) as client:
            return await client.infer("echo", X)

    assert asyncio.run(call())["x"].tolist() == [1, 1]


def test_whoever_speaks_plainly_is_told_about_tls(address: str) -> None:
    with Client(address) as client, pytest.raises(Unreachable) as raised:
        client.infer("echo", X)
    assert raised.value.__notes__ == [CHECK_TLS]


@pytest.mark.parametrize("wrong", [{"ca": "stranger"}, {"own": "stranger"}, {"own": None}], ids=str)
def test_whoever_is_not_known_is_not_answered(
    address: str, folder: Path, wrong: dict[str, Any]
) -> None:
    with (
        Client(address, tls=options(folder, **wrong)) as client,
        pytest.raises(Unreachable) as raised,
    ):
        client.infer("echo", X)
    assert raised.value.__notes__ == [CHECK_TLS]


def test_the_name_is_checked(address: str, folder: Path) -> None:
    wanted = options(folder)
    other = TlsOptions(wanted.ca, wanted.cert, wanted.key)  # the certificate is not for 127.0.0.1
    with Client(address, tls=other) as client, pytest.raises(Unreachable) as raised:
        client.infer("echo", X)
    assert raised.value.__notes__ == [CHECK_TLS]


def test_a_certificate_needs_its_key(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="needs both cert and key"):
        TlsOptions(cert=folder / "client.pem")
