# SPDX-License-Identifier: Apache-2.0
"""TensorRT's timing cache from build to build: laid beside one, and taken back after it.

TensorRT for RTX times nothing: it offers the calls, and documents them as doing nothing.
"""

import hashlib
import logging
import os
from pathlib import Path

from thirdrail_engines.plan_cache import PlanCache
from thirdrail_engines.plan_cache.locks import open_folder
from thirdrail_engines.plan_cache.timings import TIMINGS_BYTES_MAX
from thirdrail_engines.plan_cache.trust import Untrusted, open_trusted
from thirdrail_engines.plans import Builder, PlanRequest

_log = logging.getLogger(__name__)

FILE_NAME = "timing.cache"  # in a build's folder


class BuildTimings:
    """Those of one build. The manifest gets `figures`: None where no timing cache was used."""

    def __init__(self, cache: PlanCache, request: PlanRequest, folder: Path) -> None:
        self._timings = cache.timings
        self._folder = folder
        self._name = timings_name(request)
        self.figures: dict[str, int] | None = None

    def lay_out(self) -> None:
        """Before the build."""
        if not self._name:
            return
        data = self._timings.read(self._name)
        try:
            (self._folder / FILE_NAME).write_bytes(data)
        except OSError as error:  # the build will meet it as well, if it lasts
            _log.warning("the build begins without timings: %s", error)
            data = b""
        self.figures = {"given_bytes": len(data), "kept_bytes": 0}

    def take_back(self) -> None:
        """After a build that succeeded. What it left is believed no more than its plan."""
        if self.figures is None:
            return
        try:
            data = _left(self._folder)
        except (Untrusted, OSError) as error:
            _log.warning("the build left no timings: %s", error)
            return
        if self._timings.keep(self._name, data):
            self.figures["kept_bytes"] = len(data)


def timings_name(request: PlanRequest) -> str:
    """Under which name timings fit this build; "" for a build that times nothing.

    They belong to the package, its version and the GPU; the package itself looks whether they do.
    """
    if request.builder is not Builder.TENSORRT or not request.uses_timing_cache:
        return ""
    gpu = "\n".join((request.target, *sorted(request.compute_capabilities)))
    digest = hashlib.sha256(gpu.encode()).hexdigest()[:16]
    return f"{request.builder}-{request.builder_version}-{digest}"


def _left(folder: Path) -> bytes:
    """Raises Untrusted, OSError."""
    parent = open_folder(folder)
    try:
        fd = open_trusted(FILE_NAME, parent)
    finally:
        os.close(parent)
    with open(fd, "rb") as file:
        return file.read(TIMINGS_BYTES_MAX + 1)
