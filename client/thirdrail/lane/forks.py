# SPDX-License-Identifier: Apache-2.0
"""What a forked child does with the sockets that it inherits: it closes them.

A session belongs to the process that opened it. A child that kept the socket would hide its
parent's death from the worker, and packets of two processes would mix.
"""

import os
import weakref
from typing import Protocol


class Inherited(Protocol):
    """To be used by the process that made it, and by no child of that."""

    def forget(self) -> None:
        """In the child: close what was inherited, and refuse whatever comes."""
        ...


_open: "weakref.WeakSet[Inherited]" = weakref.WeakSet()
_is_watching = False


def forget_in_children(inherited: Inherited) -> None:
    """Have `forget` called in every child that is forked while the object lives."""
    global _is_watching
    if not _is_watching:
        _is_watching = True
        os.register_at_fork(after_in_child=_forget_all)
    _open.add(inherited)


def _forget_all() -> None:
    for inherited in list(_open):
        inherited.forget()
    _open.clear()
