# SPDX-License-Identifier: Apache-2.0
"""What torch's exporters say about themselves, left unsaid: each warning with its reason."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

# Category, how the text begins, why it is no concern of ours.
_KNOWN: tuple[tuple[type[Warning], str], ...] = (
    # torch.export copies its own trees through a class that it has deprecated itself.
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    # We know that TorchScript is on its way out, and docs/torch.md says so.
    (DeprecationWarning, r"`torch\.jit\.load` is (deprecated|not supported in Python 3\.14)"),
    (DeprecationWarning, r"You are using the legacy TorchScript-based ONNX export"),
    (DeprecationWarning, r"The feature will be removed\. Please remove usage of this function"),
    # A loaded script has no Python signature; its arguments are given by position.
    (UserWarning, r"no signature found for (<torch\.ScriptMethod object|builtin )"),
)

_NOISY = "torch.onnx._internal.exporter._registration"  # names each operator of absent packages


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """For one thread at a time: Python's warning filters are the process'."""
    logger = logging.getLogger(_NOISY)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category, text in _KNOWN:
                warnings.filterwarnings("ignore", text, category)
            yield
    finally:
        logger.setLevel(level)
