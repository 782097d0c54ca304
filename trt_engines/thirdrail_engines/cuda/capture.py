# SPDX-License-Identifier: Apache-2.0
"""A run as a graph, recorded while it is given to a stream once more."""

from collections.abc import Callable

from thirdrail_engines.cuda.device import Device, Graph, Stream
from thirdrail_engines.engine import EngineError


def captured(device: Device, stream: Stream, give: Callable[[], None]) -> Graph | None:
    """give: gives the run to the stream. Nobody else uses that meanwhile.

    None: it cannot be captured. Raises DeviceLost.
    """
    try:
        stream.begin_capture()
    except EngineError:
        return None
    is_given = True
    try:
        give()
    except EngineError:
        is_given = False
    try:
        graph = stream.end_capture()  # in any case: nothing else runs before that
    except EngineError:
        graph = None
    if is_given or graph is None:
        return graph
    graph.close()
    device.check()
    return None
