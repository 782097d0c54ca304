# SPDX-License-Identifier: Apache-2.0
"""Lane peers in a test's own hands that are other processes to the server."""

from support.holdings import Watch
from support.killable import Anchor
from support.lane_peer import LanePeer


class Anchored:
    """Their processes live until `kill`."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._anchors: list[Anchor] = []

    def connect(self, uid: int | None = None) -> LanePeer:
        """Without a hello."""
        anchor = Anchor(self._watch.opened().socket_path, uid)
        self._anchors.append(anchor)
        return LanePeer(anchor.sock)

    def attach(self, **fields: str) -> LanePeer:
        opened = self._watch.opened()
        anchor = Anchor(opened.socket_path)
        self._anchors.append(anchor)
        peer = LanePeer(anchor.sock)
        peer.attach(token=opened.token, **fields)
        return peer

    def kill(self) -> None:
        for anchor in self._anchors:
            anchor.kill()
            anchor.pipe.close()
            anchor.sock.close()
        self._anchors.clear()
