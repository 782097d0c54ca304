# SPDX-License-Identifier: Apache-2.0
"""`thirdrail probe` and `thirdrail sessions` against real servers."""

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.server import RunningServer
from thirdrail import Client
from thirdrail.cli.sessions import view
from thirdrail.lane.ping import PingLane
from thirdrail.v1 import sessions_pb2 as pb

Thirdrail = Callable[..., Any]
StartServer = Callable[..., RunningServer]

TRANSPORTS = ["lane", "grpc-unix", "grpc-tcp", "kserve-shared-memory", "lane-cuda"]


def test_probe_of_a_local_server(thirdrail: Thirdrail, server: RunningServer) -> None:
    done = thirdrail("probe", "--json")
    assert done.code == 0
    found = done.json
    assert found["address"] == server.url
    assert [each["name"] for each in found["transports"]] == TRANSPORTS
    lane, unix, tcp, kserve, cuda = found["transports"]
    for each in (lane, unix, tcp):
        assert each["works"], each["reason"]
        assert not each["reason"]
        for times in (each["round_trip"], each["tensor"]):
            assert 0 < times["p50_us"] <= times["p99_us"]
        assert each["mib_per_s"] == pytest.approx(1e6 / each["tensor"]["p50_us"])
    assert lane["address"] == str(server.socket.with_name("grpc.cpu.lane"))
    assert (unix["address"], tcp["address"]) == (server.url, server.address)
    assert "--allow-client-shm" in kserve["reason"]
    assert kserve["round_trip"] is None
    assert "there is no CUDA device here" in cuda["reason"]
    assert found["memory"]["write_mib_per_s"] > 0
    assert found["memory"]["read_mib_per_s"] > 0


@pytest.mark.slow
def test_probe_for_people(thirdrail: Thirdrail) -> None:
    lines = thirdrail("probe").out.splitlines()
    assert lines[0].startswith("thirdrail 0.")
    assert lines[1].split()[:4] == ["TRANSPORT", "WORKS", "ROUND", "TRIP"]
    assert [line.split()[:2] for line in lines[2:7]] == [
        ["lane", "yes"],
        ["grpc-unix", "yes"],
        ["grpc-tcp", "yes"],
        ["kserve-shared-memory", "no"],
        ["lane-cuda", "no"],
    ]
    assert lines[8].startswith("lane: ")
    assert lines[11].startswith("kserve-shared-memory: the server maps no memory")
    assert lines[-1].startswith("shared memory: this process writes ")


@pytest.mark.slow
def test_probe_says_why_not(
    start_server: StartServer, typed: Thirdrail, standard_repository: Path
) -> None:
    """The lane is offered and its socket is gone; without TCP there is less to try."""
    server = start_server(standard_repository)
    server.socket.with_name("grpc.cpu.lane").unlink()
    found = typed("probe", "--json", f"--url={server.address}").json
    lane, unix = found["transports"][:2]
    assert (lane["offered"], lane["works"]) == (True, False)
    assert "the lane's socket is not at" in lane["reason"]
    assert unix["works"]
    assert found["memory"] is None
    server = start_server(standard_repository, "--no-lane")
    lane = typed("probe", "--json", f"--url={server.url}").json["transports"][0]
    assert (lane["offered"], lane["works"]) == (False, False)
    assert "--no-lane" in lane["reason"]
    assert "no " in typed("probe", f"--url={server.url}").out


def test_sessions(thirdrail: Thirdrail, server: RunningServer) -> None:
    with Client(server.url, transport="lane") as client:
        array = client.empty(1 << 18)
        array[:] = 1
        result = client.infer("identity_fp32", {"x": array}, borrow=True)
        found = thirdrail("sessions", "--json").json
        front = next(each for each in found if each["is_front"])
        assert front["worker"] == "cpu"
        [ours] = [each for each in found if each["leases"]]
        assert ours["state"] == "active"
        assert ours["leased_bytes"] >= array.nbytes
        assert ours["input_bytes"] >= array.nbytes
        assert ours["calls"] == 1
        lines = thirdrail("sessions").out.splitlines()
        assert lines[0].split()[:6] == ["ID", "CLIENT", "WORKER", "STATE", "PID", "UID"]
        assert any(line.split()[:2] == [str(front["session"]), "(front)"] for line in lines)
        assert any(line.split()[0] == str(ours["session"]) for line in lines)
        assert np.all(result["y"] == 1)
        assert thirdrail("sessions", "--watch").out.splitlines()[0] == lines[0]  # no terminal


@pytest.mark.slow
def test_sessions_name_a_worker_that_stands_still(
    start_server: StartServer, typed: Thirdrail, standard_repository: Path
) -> None:
    server = start_server(standard_repository)
    os.kill(server.worker_pid(), signal.SIGSTOP)
    for flags in ((), ("--json",)):
        done = typed("sessions", f"--url={server.url}", *flags)
        assert done.code == 1
        assert "worker 'cpu' has said nothing for 5 s" in done.err
    assert done.json == []


def test_what_a_client_calls_itself_does_not_reach_the_terminal() -> None:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(view([pb.SessionInfo(session=7, client_name="\x1b[2J[red]x\n")]))
    assert "?[2J[red]x?" in capture.get()
    assert "\x1b[2J" not in capture.get()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_place_for_a_program_without_grpc(thirdrail: Thirdrail, as_json: bool) -> None:
    done = thirdrail("sessions", "open", *(["--json"] if as_json else []))
    assert done.code == 0
    lines = done.out.splitlines()
    place = done.json if as_json else dict(line.split(" ", 1) for line in lines)
    assert int(place["token_life_ms"]) > 0
    assert len(bytes.fromhex(place["token"])) == 16
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(place["socket"])
        with PingLane(sock, bytes.fromhex(place["token"])) as lane:
            lane.ping()
            shown = thirdrail("sessions", "--json").json
            assert int(place["session"]) in [each["session"] for each in shown]


def test_refusals(start_server: StartServer, typed: Thirdrail, standard_repository: Path) -> None:
    server = start_server(standard_repository, "--no-lane")
    done = typed("sessions", "open", f"--url={server.url}")
    assert (done.code, done.out) == (1, "")
    assert "--no-lane" in done.err
    done = typed("sessions", "open", "--worker=gpu", f"--url={server.url}", "--json")
    assert (done.code, done.out) == (1, "")
    assert json.loads(done.err)["error"]["reason"] in ("NOT_FOUND", "FAILED_PRECONDITION")


def test_nobody_there(typed: Thirdrail, tmp_path: Path) -> None:
    for command in ("probe", "sessions"):
        done = typed(command, f"--url=unix:{tmp_path}/nobody.sock")
        assert (done.code, done.out) == (3, "")
        assert "thirdrail serve REPOSITORY" in done.err
