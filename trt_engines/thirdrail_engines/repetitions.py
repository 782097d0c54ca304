# SPDX-License-Identifier: Apache-2.0
"""Builders say the same of one tensor after the other: people read it once."""

import re
from collections import Counter
from collections.abc import Iterable

_NUMBER = re.compile(r"\d+")


def once_each(texts: Iterable[str]) -> list[str]:
    """Of texts that differ in numbers alone the first, and how many more there are."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for text in texts:
        kind = _NUMBER.sub("0", text)
        first.setdefault(kind, text)
        counts[kind] += 1
    return [
        text if counts[kind] == 1 else f"{text} (and {counts[kind] - 1} more like it)"
        for kind, text in first.items()
    ]
