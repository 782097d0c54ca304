# SPDX-License-Identifier: Apache-2.0
"""Tokens that are out, and the exports that they are good for."""

import hashlib
import hmac
import secrets
from collections.abc import Iterator

from thirdrail_server.worker.export_life import Export

TOKEN_BYTES = 16


class Offers:
    """Found by a keyed hash and compared in constant time: how long an answer takes says nothing
    about the tokens that there are.
    """

    def __init__(self) -> None:
        self._by_hash: dict[bytes, Export] = {}
        self._hash_key = secrets.token_bytes(32)

    def __len__(self) -> int:
        return len(self._by_hash)

    def __iter__(self) -> Iterator[Export]:
        """As they are now: they may end on the way."""
        return iter(list(self._by_hash.values()))

    def add(self, export: Export) -> None:
        self._by_hash[self._hash(export.token)] = export

    def find(self, token: bytes) -> Export | None:
        export = self._by_hash.get(self._hash(token))
        if export is None or not hmac.compare_digest(export.token, token):
            return None
        return export

    def remove(self, export: Export) -> None:
        del self._by_hash[self._hash(export.token)]

    def _hash(self, token: bytes) -> bytes:
        return hashlib.blake2b(token, key=self._hash_key, digest_size=TOKEN_BYTES).digest()
