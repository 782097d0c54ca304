# SPDX-License-Identifier: Apache-2.0
"""Sessions on the lane as they were recorded: packets in hexadecimal, a line each.

`>` goes to the worker, `<` to the client, `<+` to the client with a descriptor of memory. A
recording of an older version stands for a client, or a worker, of that version.
`python -m support.recordings FOLDER` (in tests/) records sessions of today.
"""

import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.models import identity, write
from support.worker import running_worker
from thirdrail.errors import Cancelled, NotFound
from thirdrail.lane.blocking_exports import export, receive
from thirdrail.lane.encoding import Encoder
from thirdrail.lane.hello import attach_lane
from thirdrail.v1 import lane_pb2

MODEL = "identity_fp32"
SMALL = np.arange(16, dtype=np.float32)
LARGE = np.arange(8192, dtype=np.float32)
PACKET_BYTES_MAX = 1 << 16
ANSWER_S_MAX = 60

_TO_WORKER, _TO_CLIENT, _WITH_MEMORY = ">", "<", "<+"


@dataclass(frozen=True, slots=True)
class Packet:
    is_request: bool
    data: bytes
    has_memory: bool = False

    @property
    def request(self) -> lane_pb2.LaneRequest:
        return lane_pb2.LaneRequest.FromString(self.data)

    @property
    def response(self) -> lane_pb2.LaneResponse:
        return lane_pb2.LaneResponse.FromString(self.data)


def read_recording(path: Path) -> list[Packet]:
    lines = [line.split() for line in path.read_text().splitlines() if line[:1] in "<>" and line]
    return [
        Packet(mark == _TO_WORKER, bytes.fromhex(data), mark == _WITH_MEMORY)
        for mark, data in lines
    ]


def make_calls(sock: socket.socket) -> list[Any]:
    """What a client of today does in one session, and what it sees: inline tensors, tensors in
    memory, a result as an input, an error, releases, a good end.
    """
    lane, options = attach_lane(sock, client_name="recording"), Encoder().options(MODEL, None, {})
    seen: list[Any] = [lane.infer(options, {"x": SMALL}, timeout=ANSWER_S_MAX)["y"].tolist()]
    seen.append(lane.infer(options, {"x": LARGE}, timeout=ANSWER_S_MAX)["y"].tolist())
    with lane.infer(options, {"x": LARGE}, borrow=True, timeout=ANSWER_S_MAX) as held:
        seen.append(lane.infer(options, {"x": held["y"]}, timeout=ANSWER_S_MAX)["y"].tolist())
    try:
        lane.infer(Encoder().options("unheard_of", None, {}), {"x": SMALL}, timeout=ANSWER_S_MAX)
    except NotFound as error:
        seen.append(str(error))
    seen.append(lane.infer(options, {"x": SMALL}, timeout=ANSWER_S_MAX)["y"].tolist())
    lane.close(Cancelled("the recording is over"))
    return seen


def hand_over(sock: socket.socket) -> list[Any]:
    """The same for a tensor that is exported, received, used as an input, dropped and revoked."""
    lane, options = attach_lane(sock, client_name="recording"), Encoder().options(MODEL, None, {})
    array = lane.empty(LARGE.shape, LARGE.dtype, alone=True)
    array[:] = LARGE
    offer = export(lane, array, None, ANSWER_S_MAX)
    with receive(lane, offer.token) as shared:
        seen: list[Any] = [offer.copies, shared.array.tolist()]
        again = lane.infer(options, {"x": shared.array}, timeout=ANSWER_S_MAX)
        seen.append(again["y"].tolist())
    lane.infer(options, {"x": SMALL}, timeout=ANSWER_S_MAX)
    offer.revoke()
    del array, shared
    lane.close(Cancelled("the recording is over"))
    return seen


# By the name of the recording.
SESSIONS: dict[str, Callable[[socket.socket], list[Any]]] = {
    "calls": make_calls,
    "handover": hand_over,
}


class Recorder:
    """Stands between a client and a worker, and writes down what passes."""

    def __init__(self, worker: socket.socket) -> None:
        self.packets: list[Packet] = []
        self.client, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ways = ((ours, worker, True), (worker, ours, False))
        self._threads = [threading.Thread(target=self._pass, args=way) for way in ways]
        for thread in self._threads:
            thread.start()

    def _pass(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(source, PACKET_BYTES_MAX, 4)
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            # Before it is passed on: the answer must come behind it.
            self.packets.append(Packet(is_request, data, bool(fds)))
            socket.send_fds(target, [data], fds)
            for fd in fds:
                os.close(fd)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def record(use: Callable[[socket.socket], list[Any]]) -> list[Packet]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), MODEL, identity())
        with running_worker(lanes=2) as worker:
            worker.load(Path(folder))
            worker.attach()  # the front's, as in a server
            recorder = Recorder(worker.sockets.pop())
            use(recorder.client)
            recorder.join()
    return recorder.packets


def lines_of(packets: Sequence[Packet]) -> str:
    def mark(packet: Packet) -> str:
        if packet.is_request:
            return _TO_WORKER
        return _WITH_MEMORY if packet.has_memory else _TO_CLIENT

    return "".join(f"{mark(packet)} {packet.data.hex()}\n" for packet in packets)


if __name__ == "__main__":
    for name, use in SESSIONS.items():
        (Path(sys.argv[1]) / f"{name}.hex").write_text(
            "# SPDX-License-Identifier: Apache-2.0\n"
            f"# {use.__name__} in tests/support/recordings.py\n{lines_of(record(use))}"
        )
