# SPDX-License-Identifier: Apache-2.0
"""Users, numbers and patience: whom the worker lets in, and what it tells the others."""

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.lane_peer import LanePeer, connect, hello, infer
from support.worker import running_worker
from thirdrail.errors import ResourceExhausted
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.config import ConfigError, SessionLimits, WorkerConfig
from thirdrail_server.worker.farewells import LINGERING_MAX

TESTS = Path(__file__).parent.parent
STRANGER = 54321
UNTIL_S_MAX = 60

# Connects as another user and says what it is told.
CHILD = """
import os, sys
from support.lane_peer import LanePeer, connect
os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
print(LanePeer(connect(sys.argv[2])).goodbye().message)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that others may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def config(**limits: object) -> WorkerConfig:
    return WorkerConfig(sessions=SessionLimits(**limits))  # type: ignore[arg-type]


def test_a_user_who_is_not_allowed_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "cpu.lane"
    with running_worker(config(uids=(STRANGER,)), listen=path) as worker:
        opened = worker.open_session()
        before = worker.fd_count()
        os.kill(worker.process.pid, signal.SIGSTOP)
        peer = LanePeer(connect(path))
        peer.send(hello(token=opened.token))  # not read any more
        os.kill(worker.process.pid, signal.SIGCONT)
        peer.wait_for_hang_up()
        status = peer.goodbye()
        assert status.reason == pb.REASON_PERMISSION_DENIED
        assert status.message == (
            f"uid {os.geteuid()} may not attach to this server; its operator allows uids with "
            "--lane-uid"
        )
        assert peer.is_cut_off()
        peer.close()
        (refused,) = worker.status().attach_refusals
        assert (refused.reason, refused.clients) == ("PERMISSION_DENIED", 1)
        until(lambda: worker.fd_count() <= before)
        assert opened.session in worker.sessions(), "its token was not used up"


def test_who_is_refused_before_the_hello_still_reads_why(tmp_path: Path) -> None:
    """A client whose hello fails (EPIPE) would not look for the answer."""
    path = tmp_path / "cpu.lane"
    with running_worker(config(uids=(STRANGER,)), listen=path) as worker:
        words = (hello(token=worker.open_session().token), infer(1))
        peer = LanePeer(connect(path))
        select.select([peer.sock], [], [])  # the refusal is there
        peer.send(*words)
        assert "may not attach to this server" in peer.goodbye().message
        peer.close()


def test_those_who_are_refused_and_stay_are_bounded(tmp_path: Path) -> None:
    path, log = tmp_path / "cpu.lane", tmp_path / "log.txt"
    with running_worker(config(uids=(STRANGER,)), listen=path, log=log) as worker:
        assert worker.status().sessions == 1  # it is up
        before = worker.fd_count()
        peers = [LanePeer(connect(path)) for _ in range(2 * LINGERING_MAX)]
        for peer in peers:
            peer.goodbye()
        (refused,) = worker.status().attach_refusals
        assert refused.clients == len(peers)
        assert worker.fd_count() <= before + LINGERING_MAX
        assert log.read_text().count("was refused") == 1, "nobody fills the log"
        until(lambda: worker.fd_count() <= before)
        for peer in peers:
            peer.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_by_default_only_the_servers_own_user_may_attach(open_folder: Path) -> None:
    path = open_folder / "cpu.lane"
    with running_worker(listen=path) as worker:
        path.chmod(0o666)
        command = [sys.executable, "-c", CHILD, str(STRANGER), str(path)]
        environment = os.environ | {"PYTHONPATH": str(TESTS)}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.startswith(f"uid {STRANGER} may not attach to this server")
        worker.peer().close()


def test_everybody_may_attach_where_that_is_wished(tmp_path: Path) -> None:
    with running_worker(config(uids=None), listen=tmp_path / "cpu.lane") as worker:
        worker.peer().close()


def test_sessions_are_bounded_for_all_and_for_each_user(tmp_path: Path) -> None:
    limits = config(sessions_max=3, sessions_per_uid_max=2)
    with running_worker(limits, listen=tmp_path / "cpu.lane") as worker:
        peers = [worker.peer(), worker.peer()]
        third = LanePeer(connect(tmp_path / "cpu.lane"))
        third.send(hello(token=worker.open_session().token))
        status = third.goodbye()
        assert status.reason == pb.REASON_RESOURCE_EXHAUSTED
        assert status.message == (
            f"uid {os.geteuid()} has 2 sessions, the most that one may have; the operator sets it "
            "with --max-sessions-per-uid"
        )
        peers.pop().close()
        until(lambda: len(worker.sessions()) == 1)
        peers.append(worker.peer())
        for each in (*peers, third):
            each.close()


def test_no_token_is_given_where_no_session_may_be_opened(tmp_path: Path) -> None:
    with running_worker(config(sessions_max=1), listen=tmp_path / "cpu.lane") as worker:
        peer = worker.peer()
        with pytest.raises(ResourceExhausted, match="1 sessions are attached, the most there may"):
            worker.open_session()
        assert worker.attach().calls_in_flight == 0, "the front's lane does not count"
        peer.close()


def test_who_says_no_hello_is_hung_up_on(tmp_path: Path) -> None:
    with running_worker(config(hello_ms_max=50), listen=tmp_path / "cpu.lane") as worker:
        assert worker.status().sessions == 1  # it is up
        before = worker.fd_count()
        peer = LanePeer(connect(tmp_path / "cpu.lane"))
        status = peer.goodbye()
        assert (status.reason, status.message) == (
            pb.REASON_TIMED_OUT,
            "no hello came within 50 ms",
        )
        peer.close()
        until(lambda: worker.fd_count() <= before)


def test_of_too_many_strangers_the_oldest_has_to_go(tmp_path: Path) -> None:
    with running_worker(config(tokens_pending_max=2), listen=tmp_path / "cpu.lane") as worker:
        first, second, third = (LanePeer(connect(tmp_path / "cpu.lane")) for _ in range(3))
        assert first.goodbye().message == "too many clients have not said hello"
        third.attach(token=worker.open_session().token)
        second.attach(token=worker.open_session().token)
        for each in (first, second, third):
            each.close()


def test_a_client_name_is_shown_and_cut_short(tmp_path: Path) -> None:
    with running_worker(listen=tmp_path / "cpu.lane") as worker:
        peer = worker.peer(client_name="x" * 10_000)
        assert worker.sessions()[peer.attachment.session].client_name == "x" * 128
        peer.answer(infer(1))
        peer.close()


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"sessions_max": 0}, "sessions_max must be 1 or more, got 0"),
        ({"token_life_ms": 0}, "token_life_ms must be 1 or more, got 0"),
        ({"arena_bytes_total_max": -1}, "arena_bytes_total_max must be 1 or more, got -1"),
        ({"uids": (0, -1)}, "uids must be user ids from 0 to 4294967294, got -1"),
        ({"uids": (2**32 - 1,)}, "uids must be user ids from 0 to 4294967294, got 4294967295"),
    ],
)
def test_settings_that_make_no_sense_are_refused(limits: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config(**limits)


@pytest.mark.parametrize("uids", [(), (0, 1000), None])
def test_the_worker_is_told_all_settings(uids: tuple[int, ...] | None) -> None:
    whole = config(uids=uids, sessions_max=3, huge_pages=True)
    assert WorkerConfig.from_json(whole.to_json()) == whole


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + UNTIL_S_MAX
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)
