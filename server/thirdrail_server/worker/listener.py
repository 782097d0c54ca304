# SPDX-License-Identifier: Apache-2.0
"""Takes clients off the lane's listening socket, which the front keeps over restarts."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Collection

from thirdrail.errors import PermissionDenied, ThirdrailError
from thirdrail.v1 import inference_pb2, lane_pb2
from thirdrail_server.worker.farewells import Farewells
from thirdrail_server.worker.peers import Peer, peer_of

log = logging.getLogger(__name__)

ACCEPTS_PER_WAKEUP_MAX = 16
SILENCE_S = 60.0  # between two lines in the log about clients that are refused; all are counted
PAUSE_S = 0.2  # after the process has run out of descriptors

_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


class Listener:
    """From `__init__` to `close`.

    uids: who may attach; None: anybody.
    on_client: takes a connected socket over, and its peer's descriptor.
    on_refused: told of everybody who was turned away before that.
    """

    def __init__(
        self,
        sock: socket.socket,
        uids: Collection[int] | None,
        on_client: Callable[[socket.socket, Peer], None],
        on_refused: Callable[[ThirdrailError], None],
        farewells: Farewells,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._uids = uids
        self._on_client = on_client
        self._on_refused = on_refused
        self._farewells = farewells
        self._loop = asyncio.get_running_loop()
        self._silent_until_s = 0.0
        self._pause: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock, self._on_readable)

    def close(self) -> None:
        """The listening socket lives on in the front."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()

    def _on_readable(self) -> None:
        for _ in range(ACCEPTS_PER_WAKEUP_MAX):
            try:
                client, _ = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return None
            except OSError as error:
                if error.errno not in _NO_DESCRIPTORS:
                    raise
                return self._rest(error)
            self._take(client)

    def _rest(self, error: OSError) -> None:
        """Whoever waits stays in the line: looking again at once would find the same."""
        log.error("no client can be taken for %g s: %s", PAUSE_S, error.strerror)
        self._loop.remove_reader(self._sock)
        self._pause = self._loop.call_later(
            PAUSE_S, self._loop.add_reader, self._sock, self._on_readable
        )

    def _take(self, client: socket.socket) -> None:
        try:
            peer = peer_of(client)
        except OSError as error:
            log.debug("a client was gone before it was known: %s", error.strerror)
            return client.close()
        if self._uids is not None and peer.uid not in self._uids:
            refusal = PermissionDenied(
                f"uid {peer.uid} may not attach to this server; its operator allows uids with "
                "--lane-uid"
            )
            return self.refuse(client, peer, refusal)
        self._on_client(client, peer)

    def refuse(self, client: socket.socket, peer: Peer, error: ThirdrailError) -> None:
        """Say why, and hang up."""
        self._on_refused(error)
        if self._loop.time() >= self._silent_until_s:  # whoever is refused shall not fill the log
            self._silent_until_s = self._loop.time() + SILENCE_S
            log.warning("a client (%s) was refused: %s", peer, error.message)
        status = inference_pb2.Status(reason=error.reason, message=error.message)
        goodbye = lane_pb2.LaneResponse(goodbye=lane_pb2.Goodbye(status=status))
        client.setblocking(False)
        with contextlib.suppress(OSError):
            client.send(goodbye.SerializeToString())
        self._farewells.linger(client)
        if peer.pidfd is not None:
            os.close(peer.pidfd)
