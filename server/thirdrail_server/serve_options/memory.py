# SPDX-License-Identifier: Apache-2.0
"""What models may take."""

from typing import Annotated

from thirdrail_server.config import OverBudget, SwapOverBudget
from thirdrail_server.serve_options.panel import in_panel

option = in_panel("Memory")

MemoryGib = Annotated[
    float,
    option(
        "Memory of the models on the CPU together, while nothing runs. 0: no budget.",
        "--memory-gib",
    ),
]
DeviceMemoryGib = Annotated[
    float,
    option("The same for each GPU, of its own memory.", "--device-memory-gib"),
]
Over = Annotated[
    OverBudget,
    option(
        "A model that does not fit. refuse: is not loaded. evict: idle models make room, the "
        "least recently used first.",
        "--over-budget",
    ),
]
Swap = Annotated[
    SwapOverBudget,
    option(
        "A reload that does not fit beside what serves. refuse: is not done. unload-first: the "
        "model is not served meanwhile.",
        "--swap",
    ),
]
EvictAfter = Annotated[
    int,
    option(
        "Seconds since its last request or load before a model counts as idle.",
        "--evict-after",
    ),
]
