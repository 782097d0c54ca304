# SPDX-License-Identifier: Apache-2.0
"""Tokens: proof that whoever says hello on the lane's socket has just asked for it over gRPC."""

import hmac
from collections.abc import Callable
from dataclasses import dataclass

from thirdrail.errors import PermissionDenied

TOKEN_BYTES = 16
MS = 1_000_000  # nanoseconds


@dataclass(frozen=True, slots=True)
class Issued:
    """A session that somebody asked for and nobody has attached to yet."""

    session: int
    token: bytes
    issued_ns: int


class TokenTable:
    """Tokens that wait for their hello: a bounded number, each for a short time, each good once.

    Where too many wait, the oldest is forgotten. Honest clients use theirs at once, so whoever asks
    for many keeps nobody out.

    secret: makes so many random bytes.
    """

    def __init__(self, pending_max: int, life_ms: int, secret: Callable[[int], bytes]) -> None:
        self._pending_max = pending_max
        self._life_ns = life_ms * MS
        self._secret = secret
        self._pending: dict[int, Issued] = {}  # by session, oldest first

    def pending(self, now_ns: int) -> list[Issued]:
        self._expire(now_ns)
        return list(self._pending.values())

    def issue(self, session: int, now_ns: int) -> bytes:
        """A token for this session."""
        self._expire(now_ns)
        if len(self._pending) >= self._pending_max:
            del self._pending[next(iter(self._pending))]
        token = self._secret(TOKEN_BYTES)
        self._pending[session] = Issued(session, token, now_ns)
        return token

    def redeem(self, token: bytes, now_ns: int) -> Issued:
        """The session that the token opens; it is used up.

        Raises PermissionDenied, with one text for tokens that are unknown, used up, forgotten or
        too old: who has none learns nothing.
        """
        self._expire(now_ns)
        found = None
        for each in self._pending.values():
            if hmac.compare_digest(each.token, token):
                found = each
        if found is None:
            raise PermissionDenied(
                "the hello's token is not one of a session that waits for it: each is good for one "
                f"hello, within {self._life_ns // MS} ms of OpenSession, and only the newest "
                f"{self._pending_max} wait"
            )
        return self._pending.pop(found.session)

    def _expire(self, now_ns: int) -> None:
        for each in list(self._pending.values()):
            if now_ns - each.issued_ns <= self._life_ns:
                break
            del self._pending[each.session]
