# SPDX-License-Identifier: Apache-2.0
"""Who may control models, or log settings: over TCP with a verified certificate, over a Unix socket
the owner alone."""

import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from thirdrail.errors import PermissionDenied
from thirdrail_server.config import ModelControlMode
from thirdrail_server.front.control.access import ControlAccess, ControlIsOff, is_owners_alone
from thirdrail_server.front.statuses import answering

EXPLICIT = ModelControlMode.EXPLICIT
METHOD = "/test.Control/Ask"


@dataclass
class Service:
    """Answers whoever may control models."""

    access: ControlAccess

    @answering
    async def ask(self, request: bytes, context: Any) -> bytes:
        self.access.authorize(context)
        return b"yes"

    def handler(self) -> grpc.GenericRpcHandler:
        methods: dict[str, Any] = {"Ask": grpc.unary_unary_rpc_method_handler(self.ask)}
        return grpc.method_handlers_generic_handler("test.Control", methods)


async def asked(channel: grpc.aio.Channel) -> grpc.StatusCode:
    async with channel:
        try:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
            await call(b"")
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def status_of_call(
    access: ControlAccess,
    listen: Callable[[grpc.aio.Server], str],
    connect: Callable[[str], grpc.aio.Channel],
) -> grpc.StatusCode:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Service(access).handler(),))
    address = listen(server)
    await server.start()
    try:
        return await asked(connect(address))
    finally:
        await server.stop(0)


async def over_socket(path: Path, access: ControlAccess) -> grpc.StatusCode:
    def listen(server: grpc.aio.Server) -> str:
        server.add_insecure_port(f"unix:{path}")
        return f"unix:{path}"

    return await status_of_call(access, listen, grpc.aio.insecure_channel)


@dataclass(frozen=True)
class Certificates:
    ca: bytes
    server: tuple[bytes, bytes]  # key, certificate
    client: tuple[bytes, bytes]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed: no certificates to test TLS with")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(("openssl", *arguments), cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
    for name in ("server", "client"):
        openssl(
            "req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)

    def pair(name: str) -> tuple[bytes, bytes]:
        return (folder / f"{name}.key").read_bytes(), (folder / f"{name}.pem").read_bytes()

    return Certificates((folder / "ca.pem").read_bytes(), pair("server"), pair("client"))


async def over_tls(
    certificates: Certificates, *, server_asks: bool, client_shows: bool
) -> grpc.StatusCode:
    def listen(server: grpc.aio.Server) -> str:
        credentials = grpc.ssl_server_credentials(
            [certificates.server], certificates.ca if server_asks else None, server_asks
        )
        return f"localhost:{server.add_secure_port('127.0.0.1:0', credentials)}"

    def connect(address: str) -> grpc.aio.Channel:
        key, certificate = certificates.client if client_shows else (None, None)
        credentials = grpc.ssl_channel_credentials(certificates.ca, key, certificate)
        return grpc.aio.secure_channel(address, credentials)

    return await status_of_call(ControlAccess(EXPLICIT, None), listen, connect)


async def test_a_verified_certificate_is_let_in(certificates: Certificates) -> None:
    status = await over_tls(certificates, server_asks=True, client_shows=True)
    assert status is grpc.StatusCode.OK


async def test_a_certificate_that_nobody_verified_is_not(certificates: Certificates) -> None:
    status = await over_tls(certificates, server_asks=False, client_shows=True)
    assert status is grpc.StatusCode.PERMISSION_DENIED


async def test_tls_without_a_client_certificate_does_not_connect(
    certificates: Certificates,
) -> None:
    status = await over_tls(certificates, server_asks=True, client_shows=False)
    assert status is grpc.StatusCode.UNAVAILABLE


async def test_plain_tcp_is_refused() -> None:
    def listen(server: grpc.aio.Server) -> str:
        return f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"

    access = ControlAccess(EXPLICIT, None)
    status = await status_of_call(access, listen, grpc.aio.insecure_channel)
    assert status is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("folder_mode", "socket_mode", "expected"),
    [
        (0o700, 0o777, grpc.StatusCode.OK),
        (0o755, 0o600, grpc.StatusCode.OK),
        (0o755, 0o755, grpc.StatusCode.OK),  # connecting needs write permission
        (0o750, 0o660, grpc.StatusCode.PERMISSION_DENIED),
        (0o711, 0o666, grpc.StatusCode.PERMISSION_DENIED),
    ],
)
async def test_a_socket_is_let_in_while_it_is_the_owners_alone(
    tmp_path: Path, folder_mode: int, socket_mode: int, expected: grpc.StatusCode
) -> None:
    path = tmp_path / "s"

    def listen(server: grpc.aio.Server) -> str:
        server.add_insecure_port(f"unix:{path}")
        path.chmod(socket_mode)
        tmp_path.chmod(folder_mode)
        return f"unix:{path}"

    access = ControlAccess(EXPLICIT, path)
    assert await status_of_call(access, listen, grpc.aio.insecure_channel) is expected


async def test_another_socket_than_the_servers_is_refused(tmp_path: Path) -> None:
    status = await over_socket(tmp_path / "s", ControlAccess(EXPLICIT, None))
    assert status is grpc.StatusCode.PERMISSION_DENIED


async def test_the_mode_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for mode in (ModelControlMode.NONE, ModelControlMode.POLL):
        status = await over_socket(path, ControlAccess(mode, path))
        assert status is grpc.StatusCode.FAILED_PRECONDITION


class Peer:
    def __init__(self, peer: str, **auth: list[bytes]) -> None:
        self._peer = peer
        self._auth = auth

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> Mapping[str, list[bytes]]:
        return self._auth


def test_log_settings_are_open_to_the_same_callers_in_any_mode(tmp_path: Path) -> None:
    verified = {"transport_security_type": [b"ssl"], "x509_pem_cert": [b"a certificate"]}
    tmp_path.chmod(0o700)
    (tmp_path / "s").touch()
    for mode in ModelControlMode:
        access = ControlAccess(mode, tmp_path / "s")
        access.authorize_settings(Peer("unix:"))
        access.authorize_settings(Peer("ipv4:127.0.0.1:5", **verified))
        with pytest.raises(PermissionDenied, match="changing log settings over TCP needs a client"):
            access.authorize_settings(Peer("ipv4:127.0.0.1:5"))
        with pytest.raises(PermissionDenied, match="changing log settings is not allowed"):
            ControlAccess(mode, None).authorize_settings(Peer("unix:"))


def test_texts_say_what_to_do(tmp_path: Path) -> None:
    for mode in (ModelControlMode.NONE, ModelControlMode.POLL):
        with pytest.raises(ControlIsOff, match="start the server with --model-control explicit"):
            ControlAccess(mode, None).authorize(Peer("ipv4:127.0.0.1:5"))
    with pytest.raises(PermissionDenied, match="needs a client certificate"):
        ControlAccess(EXPLICIT, None).authorize(Peer("ipv4:127.0.0.1:5"))
    with pytest.raises(PermissionDenied, match="cannot tell who may use its socket"):
        ControlAccess(EXPLICIT, tmp_path / "gone").authorize(Peer("unix:"))


def test_somebody_elses_socket_is_not_private(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        is_owners_alone(tmp_path / "gone" / "s")
    assert not is_owners_alone(Path("/tmp"))
