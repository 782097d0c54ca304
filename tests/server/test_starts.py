# SPDX-License-Identifier: Apache-2.0
"""What a person sees who starts a server: first lines, and every way not to start."""

import re
import resource
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from conftest import StartServer
from support.models import identity, write
from support.server import RunningServer


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    write(folder, "plus", identity())
    return folder


def refusal(server: RunningServer, code: int) -> str:
    """What a server that cannot start says, with its frame and line breaks taken away."""
    assert server.process.wait(30) == code, server.log_text()
    return " ".join(re.sub("[│╭╮╰╯─]", " ", server.log_text()).split())


def test_the_first_lines_say_where_what_and_how_to_go_on(
    repository: Path, start_server: StartServer
) -> None:
    write(repository, "other", identity())
    server = start_server(repository)
    assert server.stop() == 0
    where, worker, *models, ready, stopping = server.log_text().splitlines()
    assert where.endswith(f"listening on {server.address} and unix:{server.socket}")
    assert "worker 'cpu' is up" in worker
    assert sorted(line.partition("front: ")[2] for line in models) == [
        "model 'other' serves, version 1",
        "model 'plus' serves, version 1",
    ]
    assert re.search(rf": 2 models; see `thirdrail models --url unix:{server.socket}`$", ready)
    assert stopping.endswith("front: stopping")


def test_a_broken_model_is_told_at_the_end_of_the_start(
    repository: Path, start_server: StartServer
) -> None:
    (repository / "broken").mkdir()
    server = start_server(repository)
    server.stop()
    assert "with 1 of 2 models; not loaded: broken; " in server.log_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--address=nowhere"], "must be HOST:PORT"),
        (["--max-queue=0"], "--max-queue must be 1 or more, got 0"),
        (["--threads=-1"], "--threads must be 0 or more, got -1"),
        (["--threads=100000"], "--threads must be at most 4096, got 100000"),
        (["--load-model=plus"], "--load-model needs --model-control explicit"),
        (["--derive-batching=1"], "--derive-batching must be 0 (off) or 2 or more, got 1"),
        (["--log-format=xml"], "--log-format takes text or json"),
        (["--tls-cert=c"], "TLS needs both --tls-cert and --tls-key"),
    ],
)
def test_wrong_flags_are_named(
    repository: Path, start_server: StartServer, arguments: list[str], text: str
) -> None:
    assert text in refusal(start_server(repository, *arguments, wait=False), 2)


@pytest.mark.slow
def test_it_may_have_as_many_files_as_the_system_lets_it(
    repository: Path, start_server: StartServer
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1, 1000), hard))
    try:
        server = start_server(repository)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_a_taken_port_is_told_without_noise(repository: Path, start_server: StartServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start_server(repository, f"--address=127.0.0.1:{port}", wait=False)
        expected = f"thirdrail serve: cannot listen on 127.0.0.1:{port}: address already in use; "
        assert refusal(server, 1) == f"{expected}choose another --address"
        server = start_server(repository, f"--metrics-port={port}", wait=False)
        expected = f"cannot serve metrics on 127.0.0.1:{port}: address already in use; choose anot"
        assert expected in refusal(server, 1)


def test_a_startup_model_that_is_not_there_is_told(
    repository: Path, start_server: StartServer
) -> None:
    flags = ("--model-control=explicit", "--load-model=nope")
    text = refusal(start_server(repository, *flags, wait=False), 1)
    assert text == (
        f"thirdrail serve: the model repository '{repository}' has no model 'nope' to load at the "
        "start (--load-model)"
    )


def test_a_socket_that_cannot_be_made_is_told(
    repository: Path, start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    flag = f"--socket={tmp_path}/file/grpc.sock"
    text = refusal(start_server(repository, flag, wait=False), 1)
    assert text.startswith(f"thirdrail serve: cannot listen on the socket '{tmp_path}/file/grpc.so")
    assert text.endswith("choose another --socket, or --no-socket")
    assert "Errno" not in text


@pytest.mark.slow
def test_tls_files_that_cannot_be_used_are_named(
    repository: Path, start_server: StartServer, tmp_path: Path
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed: no certificates to test TLS with")
    for name in ("a", "b"):
        _self_signed(tmp_path, name)
    flags = [f"--tls-cert={tmp_path}/a.pem", f"--tls-key={tmp_path}/b.key"]
    text = refusal(start_server(repository, *flags, wait=False), 1)
    assert text.endswith(f"'{tmp_path}/b.key' cannot be used: key values mismatch")
    flags = [f"--tls-cert={tmp_path}/a.pem", f"--tls-key={tmp_path}/a.key"]
    ca = f"--tls-client-ca={tmp_path}/a.key"
    text = refusal(start_server(repository, *flags, ca, wait=False), 1)
    assert "the client CA" in text
    assert text.endswith("cannot be used: no certificate or crl found")
    text = refusal(start_server(repository, flags[0], "--tls-key=/none", wait=False), 1)
    assert text.endswith("the TLS key '/none' cannot be read: No such file or directory")


def _self_signed(folder: Path, name: str) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    files = ("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    command = ("openssl", "req", "-x509", *key, *files)
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
