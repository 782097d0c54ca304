# SPDX-License-Identifier: Apache-2.0
"""What callers may take."""

from typing import Annotated

from thirdrail_server.serve_options.panel import in_panel

option = in_panel("Limits")

MaxMessageMib = Annotated[int, option("Largest message, each way.", "--max-message-mib")]
MaxCalls = Annotated[
    int,
    option("Calls and streams at once, all clients together.", "--max-calls"),
]
MaxConnections = Annotated[int, option("Connections at once.", "--max-connections")]
MaxStreamRequests = Annotated[
    int,
    option("Requests in flight per stream.", "--max-stream-requests"),
]
MaxQueue = Annotated[
    int,
    option(
        "Waiting requests per model, where its configuration says nothing.",
        "--max-queue",
    ),
]
ShutdownSeconds = Annotated[
    float,
    option(
        "How long requests in flight may take after SIGTERM.",
        "--shutdown-seconds",
    ),
]
