# SPDX-License-Identifier: Apache-2.0
"""tritonclient's gRPC client, unmodified, against a live server."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.environments import PythonEnvironment, run
from support.server import RunningServer

pytestmark = [pytest.mark.needs_packages, pytest.mark.timeout(600)]

RunProgram = Callable[..., str]
StartServer = Callable[..., RunningServer]
EXPLICIT = ("--model-control=explicit", "--load-model=add", "--load-model=plus_one")


@pytest.mark.parametrize("program", ["unary", "refusals", "async", "streams"])
def test_over_tcp(
    program: str,
    server: RunningServer,
    tritonclient_environment: PythonEnvironment,
    run_program: RunProgram,
) -> None:
    run_program(tritonclient_environment, f"tritonclient_{program}", server.address)
    assert "Traceback" not in server.log_text()


@pytest.mark.parametrize("program", ["unary", "streams"])
def test_over_the_unix_socket(
    program: str,
    server: RunningServer,
    tritonclient_environment: PythonEnvironment,
    run_program: RunProgram,
) -> None:
    run_program(tritonclient_environment, f"tritonclient_{program}", server.url)


def test_model_control(
    start_server: StartServer,
    standard_repository: Path,
    tritonclient_environment: PythonEnvironment,
    run_program: RunProgram,
) -> None:
    server = start_server(standard_repository, *EXPLICIT)
    file = standard_repository / "plus_one" / "1" / "model.onnx"
    program = "tritonclient_control"
    run_program(tritonclient_environment, program, server.url, PLUS_ONE_FILE=file)
    assert "Traceback" not in server.log_text()


def test_mutual_tls(
    start_server: StartServer,
    standard_repository: Path,
    tritonclient_environment: PythonEnvironment,
    run_program: RunProgram,
    tmp_path: Path,
) -> None:
    write_certificates(tmp_path)
    server = start_server(
        standard_repository,
        *EXPLICIT,
        f"--tls-cert={tmp_path / 'server.pem'}",
        f"--tls-key={tmp_path / 'server.key'}",
        f"--tls-client-ca={tmp_path / 'ca.pem'}",
    )
    program = "tritonclient_tls"
    run_program(tritonclient_environment, program, server.address, CERTIFICATES=tmp_path)
    assert "Traceback" not in server.log_text()


def write_certificates(folder: Path) -> None:
    """ca.pem, and server.pem and client.pem signed by it, each with its key; valid for a day."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "1"]
    authority = ["-CA", str(folder / "ca.pem"), "-CAkey", str(folder / "ca.key")]
    for name, signed_by in (("ca", []), ("server", authority), ("client", authority)):
        made = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
        subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
        done = run(["openssl", "req", "-x509", *key, *made, *subject, *signed_by])
        assert done.returncode == 0, done.stderr
