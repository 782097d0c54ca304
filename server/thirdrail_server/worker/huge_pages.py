# SPDX-License-Identifier: Apache-2.0
"""Chunks of the 2 MiB pages that the host has set aside, where the operator wants that.

The kernel makes such pages of other memory as well (see thirdrail.pages), as long as it finds any.
"""

import logging
import mmap

from thirdrail.lane.memory import create_chunk
from thirdrail.pages import HUGE_PAGE_BYTES

log = logging.getLogger(__name__)


class HugePages:
    """Makes chunks as `create_chunk` does, of huge pages as long as there are any. Any thread."""

    def __init__(self) -> None:
        self._said: set[bool] = set()

    def create_chunk(self, size: int, *, client_writes: bool) -> tuple[int, mmap.mmap]:
        if size % HUGE_PAGE_BYTES == 0:
            try:
                made = create_chunk(size, client_writes=client_writes, huge_pages=True)
            except OSError as error:
                self._say(False, f"the host has none left ({error.strerror}): ordinary pages")
            else:
                self._say(True, "shared memory is made of pages of 2 MiB")
                return made
        return create_chunk(size, client_writes=client_writes)

    def _say(self, is_huge: bool, text: str) -> None:
        """Once each."""
        if is_huge not in self._said:
            self._said.add(is_huge)
            log.log(logging.INFO if is_huge else logging.WARNING, "huge pages: %s", text)
