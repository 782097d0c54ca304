# SPDX-License-Identifier: Apache-2.0
"""A client process for tests to kill: `python -m support.lane_child PATH TOKEN WHAT`. It attaches,
does what it is told, says "ready" and its session's number, and waits.
"""

import contextlib
import os
import sys
import time

import numpy as np

from support.lane_peer import LanePeer, by_ref, connect, infer

LARGE = np.arange(1 << 20, dtype=np.float32)  # 4 MiB
SLEEP_S = 60


def main(path: str, token: str, what: str) -> None:
    peer = LanePeer(connect(path))
    if what != "silent":
        peer.attach(token=bytes.fromhex(token), client_name=f"a child that is {what}")
    words = [str(peer.attachment.session if what != "silent" else 0)]
    if what in ("holding", "forked", "gone", "flooding"):
        response = peer.answer(by_ref(1, peer.place(peer.grow(LARGE.nbytes), LARGE)))
        assert np.array_equal(peer.read(response.outputs[0].ref), LARGE)
    if what == "flooding":
        peer.sock.send(b"\xff")
        peer.goodbye()
        with contextlib.suppress(ConnectionError):
            while True:
                peer.send(infer(2))
    if what == "gone":
        peer.sock.close()
    if what == "forked":
        child = os.fork()
        if not child:
            time.sleep(SLEEP_S)
            os._exit(0)
        words.append(str(child))
    print("ready", *words, flush=True)
    time.sleep(SLEEP_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
