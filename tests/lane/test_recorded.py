# SPDX-License-Identifier: Apache-2.0
"""Recorded sessions of each lane version: its clients with our worker, its workers with our client.

Version 1 is the first, so both sides of its recordings are of our own version for now. They become
the peers of version N-1 when there is a version 2, and are not recorded anew.
"""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.models import identity, write
from support.recordings import LARGE, MODEL, SESSIONS, SMALL, read_recording
from support.replays import RecordedClient, RecordedWorker
from support.worker import RunningWorker, running_worker
from thirdrail.lane import wire
from thirdrail_server.worker import negotiation

RECORDED = Path(__file__).parent / "recorded"
RECORDINGS = sorted(RECORDED.glob("v*/*.hex"))
LANES = 1 + len(RECORDINGS)

_UNKNOWN = "Request for unknown model: 'unheard_of' is not found"
_SMALL, _LARGE = SMALL.tolist(), LARGE.tolist()
# What our client sees in each session.
SEEN = {
    "calls": [_SMALL, _LARGE, _LARGE, _UNKNOWN, _SMALL],
    "handover": [0, _LARGE, _LARGE],
}


def _name(recording: Path) -> str:
    return f"{recording.parent.name}-{recording.stem}"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    repository = tmp_path_factory.mktemp("repository")
    write(repository, MODEL, identity())
    with running_worker(lanes=LANES) as running:
        running.load(repository)
        yield running


def test_every_version_that_we_speak_was_recorded() -> None:
    versions = {f"v{version}" for version in range(wire.VERSION_MIN, wire.VERSION_MAX + 1)}
    assert versions == {path.name for path in RECORDED.iterdir()}
    assert wire.VERSION_MAX == negotiation.VERSION_MAX


@pytest.mark.parametrize("recording", RECORDINGS, ids=_name)
def test_a_recorded_client_is_served_by_our_worker(worker: RunningWorker, recording: Path) -> None:
    with worker.sockets.pop() as sock:
        RecordedClient(sock).play(read_recording(recording))


@pytest.mark.parametrize("recording", RECORDINGS, ids=_name)
def test_our_client_is_served_by_a_recorded_worker(recording: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker = RecordedWorker(theirs, read_recording(recording))
    serving = threading.Thread(target=worker.serve)
    serving.start()
    try:
        seen = SESSIONS[recording.stem](ours)
    finally:
        ours.close()
        serving.join()
    assert seen == SEEN[recording.stem]
