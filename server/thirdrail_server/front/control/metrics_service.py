# SPDX-License-Identifier: Apache-2.0
"""thirdrail.v1.Metrics, and the same text over HTTP for Prometheus where a port is configured."""
# ruff: noqa: N802 - the methods have the names of the protocol's calls

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc

from thirdrail import __version__
from thirdrail.v1 import metrics_pb2 as pb
from thirdrail.v1 import metrics_pb2_grpc
from thirdrail_server.front.control.metrics_text import prometheus_text
from thirdrail_server.front.control.model_control import ModelControl
from thirdrail_server.front.statuses import failures_as_status

Context = grpc.aio.ServicerContext[Any, Any]

REQUEST_BYTES_MAX = 16 << 10
REQUEST_S_MAX = 5
CONNECTIONS_MAX = 16
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_log = logging.getLogger(__name__)


class Regions(Protocol):
    """The shared memory that KServe clients have registered."""

    @property
    def count(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...


class MetricsServicer(metrics_pb2_grpc.MetricsServicer):
    """Figures of the server since this object was made."""

    def __init__(self, control: ModelControl, regions: Regions) -> None:
        self._control = control
        self._regions = regions
        self._started_ns = time.monotonic_ns()

    async def snapshot(self) -> pb.SnapshotResponse:
        counters, statuses = await asyncio.gather(
            self._control.counters(),
            asyncio.gather(*(each.status() for each in self._control.workers)),
        )
        return pb.SnapshotResponse(
            uptime_ns=time.monotonic_ns() - self._started_ns,
            server_version=__version__,
            models=counters,
            workers=statuses,
            regions=self._regions.count,
            region_bytes=self._regions.total_bytes,
            engines=self._control.engines.counters(),
        )

    async def text(self) -> str:
        """In Prometheus' text format."""
        # Of a thousand models it takes most of a second, in which calls are to be answered.
        return await asyncio.to_thread(prometheus_text, await self.snapshot())

    async def Snapshot(self, request: pb.SnapshotRequest, context: Context) -> pb.SnapshotResponse:
        async with failures_as_status(context):
            return await self.snapshot()

    async def Scrape(self, request: pb.ScrapeRequest, context: Context) -> pb.ScrapeResponse:
        async with failures_as_status(context):
            return pb.ScrapeResponse(text=await self.text())


class MetricsEndpoint:
    """GET /metrics over HTTP/1.1, and nothing else: one request per connection, few connections."""

    def __init__(self, text: Callable[[], Awaitable[str]]) -> None:
        self._text = text
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen. Returns the port, which the system chooses for 0. Raises OSError."""
        self._server = await asyncio.start_server(self._accept, host, port, limit=REQUEST_BYTES_MAX)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for task in list(self._connections):
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                writer.write(await self._answer(await reader.readuntil(b"\r\n\r\n")))
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass  # whoever it was has gone, or is too slow to be told anything
        except asyncio.LimitOverrunError:
            pass  # no scraper sends so much
        finally:
            writer.transport.abort()  # one that reads nothing would keep his place

    async def _answer(self, head: bytes) -> bytes:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request")
        method, target, _version = words
        if target.split(b"?", 1)[0] != b"/metrics":
            return _response("404 Not Found")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed")
        try:
            response = _response("200 OK", await self._text(), CONTENT_TYPE)
        except Exception:
            _log.exception("a scrape failed")
            return _response("500 Internal Server Error")
        return response if method == b"GET" else response.split(b"\r\n\r\n", 1)[0] + b"\r\n\r\n"


def _response(status: str, body: str | None = None, content_type: str = "text/plain") -> bytes:
    content = (f"{status}\n" if body is None else body).encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content
