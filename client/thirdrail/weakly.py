# SPDX-License-Identifier: Apache-2.0
"""Callbacks that keep nobody alive."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def weakly(method: Method) -> Method:
    """A bound method, for the parts of its object to call; it does nothing once that is gone.

    A part that had the method itself would form a cycle with its owner. What such an owner holds,
    a session's shared memory above all, would stay until the garbage collector comes by, which may
    be long after the last one who could use it is gone. Whoever needs an answer holds the owner.
    """
    bound: Any = method
    find, function = weakref.ref(bound.__self__), bound.__func__

    def call(*args):  # type: ignore[no-untyped-def]  # annotations would be one more cycle
        owner = find()
        return None if owner is None else function(owner, *args)

    return call  # type: ignore[return-value]
