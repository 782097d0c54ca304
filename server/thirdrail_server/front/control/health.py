# SPDX-License-Identifier: Apache-2.0
"""grpc.health.v1, answered from the catalog: nothing is stored twice, so nothing can disagree.

Service names: "" and our services' names stand for the server, which serves when every worker has
started, one of them is up and every startup model is ready; any other name is a model's, which
serves when a version of it is ready, in whichever worker. For a name that is none of these, Check
says NOT_FOUND and Watch SERVICE_UNKNOWN, as the health protocol asks. (Triton answers for the
server whatever the name is: a balancer that asks for a misspelt one then never learns it.)
"""
# ruff: noqa: N802 - the methods have the names of the protocol's calls

from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from thirdrail.errors import NotFound
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.statuses import failures_as_status

Response = health_pb2.HealthCheckResponse
Context = grpc.aio.ServicerContext[Any, Any]

SERVER_NAMES = (
    "",
    "thirdrail.v1.Inference",
    "thirdrail.v1.Models",
    "thirdrail.v1.Metrics",
    "thirdrail.v1.Sessions",
    "inference.GRPCInferenceService",
)


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # comes without types
    """strict_readiness: the server serves only when all its models are ready."""

    def __init__(self, catalog: Catalog, *, strict_readiness: bool) -> None:
        self._catalog = catalog
        self._strict_readiness = strict_readiness

    async def Check(self, request: Any, context: Context) -> Any:
        async with failures_as_status(context):
            status = self._status(request.service)
            if status == Response.SERVICE_UNKNOWN:
                raise NotFound(f"neither a service nor a model is called '{request.service}'")
        return Response(status=status)

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        async with failures_as_status(context):
            with self._catalog.subscribe() as changes:
                told = self._status(request.service)
                yield Response(status=told)
                async for name in changes:
                    if name not in ("", request.service) and request.service not in SERVER_NAMES:
                        continue
                    status = self._status(request.service)
                    if status != told:
                        told = status
                        yield Response(status=status)

    def _status(self, service: str) -> int:
        if service in SERVER_NAMES:
            is_serving = self._is_server_serving()
        elif self._catalog.get(service) is None:
            return int(Response.SERVICE_UNKNOWN)
        else:
            is_serving = self._catalog.is_ready(service) and not self._catalog.is_stopping
        return int(Response.SERVING if is_serving else Response.NOT_SERVING)

    def _is_server_serving(self) -> bool:
        if self._strict_readiness:
            return self._catalog.all_ready()
        return not self._catalog.is_stopping
