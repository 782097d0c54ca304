# SPDX-License-Identifier: Apache-2.0
"""The front process from start to end: listeners, services, one worker, and an orderly stop."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from thirdrail.lane.aio import AsyncLane
from thirdrail.v1 import inference_pb2, metrics_pb2, models_pb2
from thirdrail_server.config import ServerConfig
from thirdrail_server.control_channel import ChannelLimits
from thirdrail_server.front.control.access import ControlAccess
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.control.health import HealthServicer
from thirdrail_server.front.control.metrics_service import MetricsEndpoint, MetricsServicer
from thirdrail_server.front.control.model_control import ModelControl
from thirdrail_server.front.control.models_service import ModelsServicer
from thirdrail_server.front.control.supervisor import Supervisor
from thirdrail_server.front.control.worker_process import WorkerProcess, start_worker
from thirdrail_server.front.dispatch import Dispatcher
from thirdrail_server.front.handlers import service_handler
from thirdrail_server.front.kserve.servicer import KServeServicer
from thirdrail_server.front.listeners import channel_options, listen
from thirdrail_server.front.native_inference import NativeInference
from thirdrail_server.inference import grpc_service_pb2
from thirdrail_server.worker.process import GIL_SWITCH_S

log = logging.getLogger(__name__)

OnReady = Callable[[str | None], None]


class Front:
    """All parts of the front, wired. `await start()`, then `await stop()`."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.catalog = Catalog(config.control.models_max, config.control.watchers_max)
        self.dispatcher = Dispatcher(self.catalog)
        self._worker = Supervisor(
            config.worker.name,
            self._start_worker,
            self._attach_lane,
            config.control,
            ChannelLimits(),
        )
        self._control = ModelControl(config, self.catalog, self._worker)
        self._metrics = MetricsServicer(self._control, self._worker)
        self._metrics_endpoint = MetricsEndpoint(self._metrics.text)
        self._native = NativeInference(
            self.dispatcher, stream_requests_in_flight_max=config.stream_requests_in_flight_max
        )
        access = ControlAccess(config.model_control, config.socket)
        self._kserve = KServeServicer(
            dispatcher=self.dispatcher,
            catalog=self.catalog,
            control=self._control,
            authorize_control=access.authorize,
            authorize_settings=access.authorize_settings,
            config=config,
        )
        self._models = ModelsServicer(self.catalog, self._control, access.authorize)
        self._health = HealthServicer(self.catalog, strict_readiness=config.strict_readiness)
        self._server = grpc.aio.server(
            options=channel_options(config),
            maximum_concurrent_rpcs=config.concurrent_calls_max,
            compression=grpc.Compression.Gzip if config.compress else None,
        )
        self._is_listening = False
        self._add_services()

    def _add_services(self) -> None:
        handlers = [
            self._native.handler(),
            self._kserve.handler(),
            service_handler(_service(models_pb2), self._models),
            service_handler(_service(metrics_pb2), self._metrics),
            service_handler(_service(health_pb2), self._health),
        ]
        modules = (inference_pb2, grpc_service_pb2, models_pb2, metrics_pb2, health_pb2)
        names = [_service(module).full_name for module in modules]
        reflecting = reflection.aio.ReflectionServicer([*names, reflection.SERVICE_NAME])
        handlers.append(service_handler(_service(reflection_pb2), reflecting))
        if self._config.channelz:
            answering = channelz.aio.ChannelzServicer()
            handlers.append(service_handler(_service(channelz_pb2), answering))
        self._server.add_generic_rpc_handlers(handlers)

    async def start(self) -> str | None:
        """Listen, start the worker, begin to load. Returns the TCP address in use.

        Raises ConfigError or RepositoryError when the server cannot start; call `stop` then, too.
        """
        address = listen(self._server, self._config)
        self._is_listening = True
        await self._server.start()
        await self._control.start()
        self._worker.start(self._control.news)
        if self._config.metrics_port is not None:
            port = await self._metrics_endpoint.start(
                self._config.metrics_host, self._config.metrics_port
            )
            log.info("metrics on http://%s:%d/metrics", self._config.metrics_host, port)
        return address

    async def stop(self) -> None:
        """Not ready first; streams are told; requests in flight finish within the bound."""
        self.catalog.begin_stop()
        self._native.begin_stop()
        self._kserve.begin_stop()
        await self._server.stop(self._config.shutdown_s_max)
        await self._metrics_endpoint.stop()
        await self._control.stop()
        await self._worker.stop()
        if self._is_listening and self._config.socket is not None:  # else it is somebody else's
            self._config.socket.unlink(missing_ok=True)

    def _start_worker(self) -> WorkerProcess:
        arguments = ["--front-pid", str(os.getpid()), "--config", self._config.worker.to_json()]
        if self._config.socket is not None:
            arguments += ["--remove", str(self._config.socket)]
        return start_worker(arguments)

    async def _attach_lane(self, sock: socket.socket) -> AsyncLane:
        lane = await AsyncLane.attach(sock)
        self.dispatcher.attach(lane)
        return lane


async def run_front(config: ServerConfig, on_ready: OnReady = lambda _address: None) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends at once.

    on_ready: called once, with the TCP address, when every startup model is ready or has failed.
    """
    started = time.monotonic()
    sys.setswitchinterval(GIL_SWITCH_S)
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()

    def end() -> None:
        if ending.is_set():
            log.warning("told to end twice: ending at once")
            os._exit(1)
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    front = Front(config)
    try:
        address = await front.start()
        settled = asyncio.create_task(_settled(front.catalog))
        stopping = asyncio.create_task(ending.wait())
        await asyncio.wait({settled, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if settled.done():
            log.info("ready after %.2f s", time.monotonic() - started)
            on_ready(address)
        else:
            settled.cancel()
        await stopping
        log.info("stopping")
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            await front.stop()


async def _settled(catalog: Catalog) -> None:
    """Wait until every startup model is ready, or has failed to load."""
    with catalog.subscribe() as changes:
        while catalog.is_any_loading():
            await anext(changes)


def _service(module: Any) -> ServiceDescriptor:
    """The one of a file of messages."""
    services: list[ServiceDescriptor] = list(module.DESCRIPTOR.services_by_name.values())
    (only,) = services
    return only
