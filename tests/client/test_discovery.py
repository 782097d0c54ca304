# SPDX-License-Identifier: Apache-2.0
"""Finding the local server: the order of the places, and whom not to trust."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.echo import EchoServer, start
from support.server import reserved_port
from thirdrail import Client, Unreachable, discovery
from thirdrail.aio import AsyncClient
from thirdrail.discovery import default_socket_path, find_address, parse_url, url_of
from thirdrail.errors import InvalidArgument
from thirdrail.failures import START_A_SERVER


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, and nobody in the other places: not a server of
    whoever runs the tests, either."""
    monkeypatch.setattr(discovery, "USERS_ROOT", tmp_path / "users")
    monkeypatch.setattr(discovery, "TEMPORARY_ROOT", tmp_path / "temporary")
    monkeypatch.delenv("THIRDRAIL_URL", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "thirdrail"
    folder.mkdir()
    with reserved_port() as port:
        monkeypatch.setattr(discovery, "DEFAULT_PORT", port)
        yield folder


@pytest.fixture
def listener(runtime_folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(default_socket_path()))
        listening.listen()
        yield listening


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("example:9", "example:9"),
        ("example", "example:8001"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("[::1]:80", "[::1]:80"),
        ("[::1]", "[::1]:8001"),
        ("::1", "[::1]:8001"),
        ("/run/x.sock", "unix:/run/x.sock"),
        ("unix:/run/x.sock", "unix:/run/x.sock"),
        ("unix:///run/x.sock", "unix:///run/x.sock"),
        ("dns:///example:9", "dns:///example:9"),
    ],
)
def test_urls(url: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "DEFAULT_PORT", 8001)
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url", ["host:65536", "host:0", "host:abc", "host:", ":8001", "host:\u0661"]
)
def test_ports_that_there_are_not_are_refused(url: str) -> None:
    with pytest.raises(InvalidArgument, match="a port from 1 to 65535"):
        parse_url(url)


@pytest.mark.parametrize("url", ["http://host:1", "grpc://host", "a/b", " "])
def test_urls_of_other_kinds_are_refused(url: str) -> None:
    with pytest.raises(InvalidArgument, match="expected host:port or unix:"):
        parse_url(url)


def test_a_path_is_that_of_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in (tmp_path / "s", Path("s")):
        assert url_of(given) == str(tmp_path / "s")
    assert (url_of("host:1"), url_of(None)) == ("host:1", None)
    wrong: Any = 5
    for kind in (Client, AsyncClient):
        assert str(tmp_path / "s") in repr(kind(tmp_path / "s"))
        with pytest.raises(InvalidArgument, match="url of a server must be a str, got the int 5"):
            kind(wrong)


def test_the_servers_own_path(runtime_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, uid = discovery.SOCKET_NAME, os.getuid()
    assert default_socket_path() == runtime_folder / name
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_socket_path() == discovery.TEMPORARY_ROOT / f"thirdrail-{uid}" / name
    (discovery.USERS_ROOT / str(uid)).mkdir(parents=True)
    assert default_socket_path() == discovery.USERS_ROOT / str(uid) / "thirdrail" / name


def test_an_address_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THIRDRAIL_URL", "from-environment:1")
    assert find_address("given:2") == "given:2"
    assert find_address() == "from-environment:1"


def test_the_socket_comes_before_the_port(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as port:
        number = port.getsockname()[1]
        monkeypatch.setattr(discovery, "DEFAULT_PORT", number)
        assert find_address() == f"unix:{default_socket_path()}"
        assert find_address(sockets=False) == f"127.0.0.1:{number}"  # TLS
        listener.close()
        assert find_address() == f"127.0.0.1:{number}"  # a socket that its server left behind


def test_nobody_anywhere(runtime_folder: Path) -> None:
    with pytest.raises(Unreachable) as raised:
        find_address()
    text = str(raised.value)
    assert "THIRDRAIL_URL: not set" in text
    assert f"{runtime_folder}/grpc.sock: no such file or directory" in text
    assert f"127.0.0.1:{discovery.DEFAULT_PORT}: connection refused" in text
    assert raised.value.__notes__ == [START_A_SERVER]


def test_a_file_is_no_socket(runtime_folder: Path) -> None:
    default_socket_path().touch()
    with pytest.raises(Unreachable, match=r"grpc\.sock: not a socket"):
        find_address()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.usefixtures("listener")
def test_another_users_file_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(default_socket_path(), 12345, -1)
    with pytest.raises(Unreachable, match="belongs to uid 12345, expected 0 or root"):
        find_address()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_another_users_process_is_not_trusted(runtime_folder: Path) -> None:
    """The file may be ours; the kernel says whose process listens."""
    runtime_folder.parent.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(default_socket_path()))
        os.seteuid(12345)  # the kernel notes the effective uid at listen()
        try:
            listening.listen()
        finally:
            os.seteuid(0)
        with pytest.raises(Unreachable, match="uid 12345 listens, expected 0 or root"):
            find_address()


def test_a_client_finds_the_server(runtime_folder: Path) -> None:
    echo = EchoServer(default_socket_path())
    with Client() as client:
        with pytest.raises(Unreachable):
            client.health()
        server = start(echo)
        assert client.health()
        assert repr(client) == f"<Client {echo.url} open>"
    server.stop(None).wait()
