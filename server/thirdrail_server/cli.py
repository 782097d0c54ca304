# SPDX-License-Identifier: Apache-2.0
"""`thirdrail serve`, as a command for typer: settings in, a running server out."""

import asyncio
import importlib.util
import re
from pathlib import Path
from typing import Annotated

import typer

from thirdrail.lane.busy_poll import LONGEST_US
from thirdrail_server.busy_poll import new_loop
from thirdrail_server.config import (
    GIB,
    MIB,
    CompileConfig,
    ConfigError,
    MemoryBudget,
    ModelControlMode,
    OverBudget,
    ServerConfig,
    SessionLimits,
    SwapOverBudget,
    WorkerConfig,
    bytes_of_gib,
)
from thirdrail_server.serve_options import (
    compiling,
    lane,
    limits,
    listening,
    memory,
    models,
    needless,
    operation,
)

EXIT_CANNOT_START = 1

# The modules of the extra `server`. The worker is what needs most of them: one that lacks a package
# would be started again and again.
NEEDED_MODULES = (
    "grpc_channelz",
    "grpc_health",
    "grpc_reflection",
    "ml_dtypes",
    "onnx",
    "onnxruntime",
    "prometheus_client",
)

# Which flag sets what a ConfigError speaks of.
_FLAGS = {
    "arena_bytes_per_uid_max": "--lane-memory-mib",
    "arena_bytes_total_max": "--lane-memory-mib",
    "busy_poll_us": "--busy-poll-us",
    "build_memory_bytes_max": "--build-memory-gib",
    "build_s_max": "--build-minutes-max",
    "builds_at_once_max": "--builds-at-once",
    "bytes_max": "--memory-gib",
    "cache_bytes_max": "--cache-gib",
    "concurrent_calls_max": "--max-calls",
    "connections_max": "--max-connections",
    "derive_batch_rows": "--derive-batching",
    "device_bytes_max": "--device-memory-gib",
    "load_models": "--load-model",
    "message_bytes_max": "--max-message-mib",
    "metrics_port": "--metrics-port",
    "over_budget": "--over-budget",
    "model_control": "--model-control",
    "poll_interval_s": "--poll-interval",
    "queue_requests_max": "--max-queue",
    "sessions_max": "--max-sessions",
    "sessions_per_uid_max": "--max-sessions-per-uid",
    "shutdown_s_max": "--shutdown-seconds",
    "spared_s": "--evict-after",
    "stream_requests_in_flight_max": "--max-stream-requests",
    "threads_max": "--threads",
    "uids": "--lane-uid",
}

_MEMORY = MemoryBudget()
_SESSIONS = SessionLimits()
_COMPILING = CompileConfig()


def serve(
    ctx: typer.Context,
    repository: Annotated[
        Path,
        typer.Argument(
            metavar="REPOSITORY",
            help="The folder of models: NAME/VERSION/model.onnx, config.pbtxt optional.",
        ),
    ],
    address: listening.Address = "127.0.0.1:8001",
    socket: listening.Socket = None,
    no_tcp: listening.NoTcp = False,
    no_socket: listening.NoSocket = False,
    tls_cert: listening.TlsCert = None,
    tls_key: listening.TlsKey = None,
    tls_client_ca: listening.TlsClientCa = None,
    no_lane: lane.NoLane = False,
    lane_uid: lane.LaneUid = None,
    max_sessions: lane.MaxSessions = _SESSIONS.sessions_max,
    max_sessions_per_uid: lane.MaxSessionsPerUid = _SESSIONS.sessions_per_uid_max,
    lane_memory_mib: lane.LaneMemoryMib = _SESSIONS.arena_bytes_total_max // MIB,
    huge_pages: lane.HugePages = False,
    model_control: models.ModelControl = ModelControlMode.NONE,
    load_model: models.LoadModel = None,
    poll_interval: models.PollInterval = 2.0,
    derive_batching: models.DeriveBatching = 0,
    suggest_config: models.SuggestConfig = False,
    threads: models.Threads = 0,
    devices: models.Devices = None,
    cache_dir: compiling.CacheDir = None,
    cache_gib: compiling.CacheGib = _COMPILING.cache_bytes_max / GIB,
    read_only_cache: compiling.ReadOnlyCache = None,
    build_minutes_max: compiling.BuildMinutesMax = _COMPILING.build_s_max / 60,
    build_memory_gib: compiling.BuildMemoryGib = 0.0,
    builds_at_once: compiling.BuildsAtOnce = _COMPILING.builds_at_once_max,
    fallback: compiling.Fallback = True,
    memory_gib: memory.MemoryGib = 0,
    device_memory_gib: memory.DeviceMemoryGib = 0,
    over_budget: memory.Over = OverBudget.REFUSE,
    swap: memory.Swap = SwapOverBudget.REFUSE,
    evict_after: memory.EvictAfter = _MEMORY.spared_s,
    max_message_mib: limits.MaxMessageMib = 64,
    max_calls: limits.MaxCalls = 1024,
    max_connections: limits.MaxConnections = 1024,
    max_stream_requests: limits.MaxStreamRequests = 64,
    max_queue: limits.MaxQueue = 1024,
    busy_poll_us: operation.BusyPollUs = LONGEST_US,
    shutdown_seconds: limits.ShutdownSeconds = 30.0,
    metrics_port: operation.MetricsPort = None,
    metrics_host: operation.MetricsHost = "127.0.0.1",
    server_name: operation.ServerName = "thirdrail",
    ready_when: operation.ReadyWhen = "all-models",
    compress: operation.Compress = False,
    allow_client_shm: operation.AllowClientShm = False,
    channelz: operation.Channelz = False,
    log_level: operation.LogLevel = "info",
    log_format: operation.LogFormat = "text",
) -> None:
    """Serve the models of a repository over gRPC to the services of this host.

    \b
    thirdrail serve models/             # on 127.0.0.1:8001 and a Unix socket
    thirdrail serve models/ --no-tcp    # on the Unix socket only
    thirdrail serve models/ --model-control explicit --load-model digits

    Stop it with Ctrl-C or SIGTERM: it finishes what it has taken on first.
    """
    _require_packages()
    tls = listening.tls_files(tls_cert, tls_key, tls_client_ca)
    operation.configure_logs(log_level, log_format)
    try:
        config = ServerConfig(
            repository=repository,
            address=None if no_tcp else address,
            socket=None if no_socket else socket or listening.default_socket(),
            lane=not no_lane,
            tls=tls,
            model_control=model_control,
            load_models=tuple(load_model or ()),
            poll_interval_s=poll_interval,
            server_name=server_name,
            metrics_port=metrics_port,
            metrics_host=metrics_host,
            channelz=channelz,
            compress=compress,
            allow_client_shm=allow_client_shm,
            strict_readiness=operation.is_strict(ready_when),
            message_bytes_max=max_message_mib * MIB,
            concurrent_calls_max=max_calls,
            connections_max=max_connections,
            stream_requests_in_flight_max=max_stream_requests,
            shutdown_s_max=shutdown_seconds,
            devices=models.devices_of(devices),
            memory=MemoryBudget(
                bytes_of_gib("bytes_max", memory_gib),
                over_budget,
                swap,
                evict_after,
                bytes_of_gib("device_bytes_max", device_memory_gib),
            ),
            busy_poll_us=busy_poll_us,
            worker=WorkerConfig(
                busy_poll_us=busy_poll_us,
                threads_max=threads,
                queue_requests_max=max_queue,
                derive_batch_rows=derive_batching,
                compiling=CompileConfig(
                    cache_dir=cache_dir.absolute() if cache_dir else compiling.default_cache(),
                    cache_bytes_max=bytes_of_gib("cache_bytes_max", cache_gib),
                    read_only_caches=tuple(each.absolute() for each in read_only_cache or ()),
                    build_s_max=build_minutes_max * 60,
                    build_memory_bytes_max=bytes_of_gib("build_memory_bytes_max", build_memory_gib),
                    builds_at_once_max=builds_at_once,
                    falls_back=fallback,
                ),
                sessions=SessionLimits(
                    uids=lane.uids_of(lane_uid),
                    sessions_max=max_sessions,
                    sessions_per_uid_max=max_sessions_per_uid,
                    arena_bytes_total_max=lane_memory_mib * MIB,
                    arena_bytes_per_uid_max=lane_memory_mib * MIB // 2,
                    huge_pages=huge_pages,
                ),
            ),
        )
        needless.refuse_needless(needless.given_options(ctx), config)
        _run(config, suggest=suggest_config)
    except ConfigError as error:
        text = re.sub(r"\w+", lambda word: _FLAGS.get(word[0], word[0]), str(error))
        raise typer.BadParameter(text) from None


def _require_packages() -> None:
    """Raises ModuleNotFoundError, of which the command line makes the line to install it with."""
    for name in NEEDED_MODULES:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def _run(config: ServerConfig, *, suggest: bool) -> None:
    from thirdrail_server.repository.errors import RepositoryError

    try:
        if suggest:
            from thirdrail_server.suggestions import suggestions

            for text in suggestions(config):
                typer.echo(text)
            return
        from thirdrail_server.front.process import run_front

        with asyncio.Runner(loop_factory=lambda: new_loop(config.busy_poll_us)) as runner:
            runner.run(run_front(config))
    except (ConfigError, RepositoryError) as error:
        typer.echo(f"thirdrail serve: {error}", err=True)
        raise typer.Exit(EXIT_CANNOT_START) from None
