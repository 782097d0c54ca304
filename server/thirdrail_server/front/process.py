# SPDX-License-Identifier: Apache-2.0
"""The front process from start to end: listeners, services, workers, and an orderly stop."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from thirdrail.errors import ThirdrailError
from thirdrail.lane.aio import AsyncLane
from thirdrail.v1 import inference_pb2, metrics_pb2, models_pb2, sessions_pb2
from thirdrail_server.config import ConfigError, ServerConfig
from thirdrail_server.control_channel import ChannelLimits
from thirdrail_server.front import announcements
from thirdrail_server.front.control.access import ControlAccess
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.control.health import HealthServicer
from thirdrail_server.front.control.metrics_service import MetricsEndpoint, MetricsServicer
from thirdrail_server.front.control.model_control import ModelControl
from thirdrail_server.front.control.models_service import ModelsServicer
from thirdrail_server.front.control.supervisor import Supervisor
from thirdrail_server.front.control.worker_process import WorkerProcess, start_worker
from thirdrail_server.front.devices import find_devices, worker_config, worker_environment
from thirdrail_server.front.dispatch import Dispatcher
from thirdrail_server.front.handlers import service_handler
from thirdrail_server.front.kserve.regions import RegionRegistry
from thirdrail_server.front.kserve.servicer import KServeServicer
from thirdrail_server.front.listeners import channel_options, listen, why_not_bindable
from thirdrail_server.front.native_inference import NativeInference
from thirdrail_server.front.sessions.lane_socket import LaneSocket, bind_lane
from thirdrail_server.front.sessions.service import SessionsServicer
from thirdrail_server.inference import grpc_service_pb2
from thirdrail_server.repository.device_choice import CPU, Device
from thirdrail_server.worker.plans import refuse_untrusted_caches
from thirdrail_server.worker.process import GIL_SWITCH_S, allow_descriptors

log = logging.getLogger(__name__)

LOADING_REPORT_S = 10.0  # a start that takes longer says what it waits for
STOPPING_REPORT_S = 2.0
LAST_WORDS_S = 0.1  # for callers to read how their calls ended, before connections close
SECOND_SIGNAL_S_MIN = 0.5  # coreutils' timeout signals the child and then its group: one wish


class Front:
    """All parts of the front, wired. `await start()`, then `await stop()`.

    devices: each gets a worker; the first is that of clients who name none.
    """

    def __init__(self, config: ServerConfig, devices: Sequence[Device] = (CPU,)) -> None:
        self._config = config
        self.catalog = Catalog(config.control.models_max, config.control.watchers_max)
        self.dispatcher = Dispatcher(self.catalog)
        self._workers = {device: self._supervisor(device) for device in devices}
        self._control = ModelControl(config, self.catalog, self._workers)
        gpus = [worker for device, worker in self._workers.items() if device.uuid]
        self._regions = RegionRegistry.of(config, gpus)
        self._metrics = MetricsServicer(self._control, self._regions)
        self._metrics_endpoint = MetricsEndpoint(self._metrics.text)
        self._native = NativeInference(
            self.dispatcher, stream_requests_in_flight_max=config.stream_requests_in_flight_max
        )
        access = ControlAccess(config.model_control, config.socket)
        self._kserve = KServeServicer(
            dispatcher=self.dispatcher,
            catalog=self.catalog,
            control=self._control,
            regions=self._regions,
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
        self._sessions = SessionsServicer(config, list(self._workers.values()))
        self._lane_sockets: dict[str, LaneSocket] = {}  # by worker
        self._is_listening = False
        self._add_services()

    def _add_services(self) -> None:
        handlers = [
            self._native.handler(),
            self._kserve.handler(),
            service_handler(_service(models_pb2), self._models),
            service_handler(_service(metrics_pb2), self._metrics),
            service_handler(_service(health_pb2), self._health),
            service_handler(_service(sessions_pb2), self._sessions),
        ]
        modules = (
            inference_pb2,
            grpc_service_pb2,
            models_pb2,
            metrics_pb2,
            health_pb2,
            sessions_pb2,
        )
        names = [_service(module).full_name for module in modules]
        reflecting = reflection.aio.ReflectionServicer([*names, reflection.SERVICE_NAME])
        handlers.append(service_handler(_service(reflection_pb2), reflecting))
        if self._config.channelz:
            answering = channelz.aio.ChannelzServicer()
            handlers.append(service_handler(_service(channelz_pb2), answering))
        self._server.add_generic_rpc_handlers(handlers)

    async def start(self) -> None:
        """Listen, start the workers, begin to load.

        Raises ConfigError or RepositoryError when the server cannot start; call `stop` then, too.
        """
        refuse_untrusted_caches(self._config.worker.compiling)
        address = listen(self._server, self._config)
        self._is_listening = True
        for worker in self._workers.values():
            bound = bind_lane(self._config, worker.name)
            if bound is not None:
                self._lane_sockets[worker.name] = bound
        lanes = {name: each.path for name, each in self._lane_sockets.items()}
        self._sessions.listening(address, lanes)
        await self._server.start()
        await self._control.start()
        if self._config.metrics_port is not None:
            await self._start_metrics(self._config.metrics_host, self._config.metrics_port)
        log.info("%s", announcements.listening(self._config, address))
        for models in self._control.workers:
            models.start()

    async def _start_metrics(self, host: str, port: int) -> None:
        try:
            bound = await self._metrics_endpoint.start(host, port)
        except OSError as error:
            raise ConfigError(
                f"cannot serve metrics on {host}:{port}: {why_not_bindable(host, port) or error}; "
                f"choose another --metrics-port or --metrics-host"
            ) from None
        log.info("metrics on http://%s:%d/metrics", host, bound)

    async def stop(self) -> None:
        """Not ready first; streams are told; requests in flight finish within the bound."""
        self.catalog.begin_stop()
        self._native.begin_stop()
        self._kserve.begin_stop()
        ends_at = time.monotonic() + self._config.shutdown_s_max
        await asyncio.gather(
            self._control.cancel_loads(),
            self._until_answered(),
            self._stop_sessions(),
            *(worker.begin_stop() for worker in self._workers.values()),
        )
        await self._server.stop(max(0.0, ends_at - time.monotonic()))
        await self._metrics_endpoint.stop()
        await self._control.stop()
        await asyncio.gather(*(worker.stop() for worker in self._workers.values()))
        for lane in self._lane_sockets.values():
            lane.close()
        if self._is_listening and self._config.socket is not None:  # else it is somebody else's
            self._config.socket.unlink(missing_ok=True)

    async def _until_answered(self) -> None:
        """Wait for what is in flight, and then a moment: gRPC closes a connection right behind its
        last call, and a caller who is writing then learns of the closing and not of the answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.shutdown_s_max):
                while self.dispatcher.calls_in_flight:
                    await asyncio.sleep(LAST_WORDS_S / 5)
        await asyncio.sleep(LAST_WORDS_S)

    async def _stop_sessions(self) -> None:
        """The lane's own clients finish what is in flight, too."""
        await asyncio.gather(*map(self._stop_sessions_of, self._workers.values()))

    async def _stop_sessions_of(self, worker: Supervisor) -> None:
        drain_s_max = self._config.shutdown_s_max
        with contextlib.suppress(ThirdrailError, TimeoutError):
            async with asyncio.timeout(drain_s_max + LAST_WORDS_S):
                await worker.call("stop sessions", {"drain_s_max": drain_s_max})

    def _supervisor(self, device: Device) -> Supervisor:
        return Supervisor(
            device.worker,
            partial(self._start_worker, device),
            partial(self._attach_lane, device),
            self._config.control,
            ChannelLimits(),
        )

    def _start_worker(self, device: Device) -> WorkerProcess:
        config = worker_config(self._config, device)
        arguments = ["--front-pid", str(os.getpid()), "--config", config.to_json()]
        left_behind = [lane.path for lane in self._lane_sockets.values()]
        for path in (self._config.socket, *left_behind):
            if path is not None:
                arguments += ["--remove", str(path)]
        lane = self._lane_sockets.get(device.worker)
        return start_worker(
            arguments,
            lane_listener=None if lane is None else lane.sock,
            environment=worker_environment(device, os.environ),
        )

    async def _attach_lane(self, device: Device, sock: socket.socket) -> AsyncLane:
        lane = await AsyncLane.attach(sock)
        self.dispatcher.attach(lane, device.worker)
        return lane


async def run_front(config: ServerConfig) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; a second one ends at once.

    Raises ConfigError or RepositoryError when the server cannot start.
    """
    sys.setswitchinterval(GIL_SWITCH_S)
    allow_descriptors()
    ending = _until_signalled()
    front = Front(config, await asyncio.to_thread(find_devices, config))
    announcing = asyncio.create_task(_announce(front.catalog, config))
    try:
        await front.start()
        await ending.wait()
        log.info("stopping")
        asyncio.get_running_loop().call_later(
            STOPPING_REPORT_S,
            log.info,
            "calls in flight may take up to %g s; a second signal ends at once",
            config.shutdown_s_max,
        )
    finally:
        announcing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await front.stop()


def _until_signalled() -> asyncio.Event:
    """Set by the first SIGTERM, SIGINT or SIGHUP. The second one ends this process."""
    ending = asyncio.Event()
    first_s = 0.0

    def end() -> None:
        nonlocal first_s
        if not ending.is_set():
            first_s = time.monotonic()
            ending.set()
        elif time.monotonic() - first_s >= SECOND_SIGNAL_S_MIN:
            log.warning("told to end twice: ending at once")
            os._exit(1)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it: stay
        numbers.append(signal.SIGHUP)
    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, end)
    return ending


async def _announce(catalog: Catalog, config: ServerConfig) -> None:
    """Say how the start went, when every startup model is ready or has failed to load."""
    began_s = time.monotonic()
    with catalog.subscribe() as changes:
        while not catalog.is_settled():
            try:
                async with asyncio.timeout(LOADING_REPORT_S):
                    await anext(changes)
            except TimeoutError:
                log.info("%s", announcements.still_loading(catalog))
    log.log(*announcements.started(catalog, config, time.monotonic() - began_s))


def _service(module: Any) -> ServiceDescriptor:
    """The one of a file of messages."""
    services: list[ServiceDescriptor] = list(module.DESCRIPTOR.services_by_name.values())
    (only,) = services
    return only
