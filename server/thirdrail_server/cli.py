# SPDX-License-Identifier: Apache-2.0
"""`thirdrail serve`, as a command for typer: settings in, a running server out."""

import asyncio
import importlib.util
import os
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
    TlsFiles,
    WorkerConfig,
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

Listening = "Listening"
Lane = "Lane"
Models = "Models"
Compiling = "Compiling"
Memory = "Memory"
Limits = "Limits"
Operation = "Operation"


def _option(
    text: str, *names: str, panel: str, metavar: str | None = None
) -> typer.models.OptionInfo:
    option = typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)
    assert isinstance(option, typer.models.OptionInfo)
    return option


def serve(
    repository: Annotated[
        Path,
        typer.Argument(
            metavar="REPOSITORY",
            help="The folder of models: NAME/VERSION/model.onnx, config.pbtxt optional.",
        ),
    ],
    address: Annotated[
        str, _option("Where to listen on TCP.", "--address", panel=Listening, metavar="HOST:PORT")
    ] = "127.0.0.1:8001",
    socket: Annotated[
        Path | None,
        _option(
            "The Unix socket to listen on. \\[default: where clients look]",
            "--socket",
            panel=Listening,
        ),
    ] = None,
    no_tcp: Annotated[
        bool, _option("Listen on the Unix socket only.", "--no-tcp", panel=Listening)
    ] = False,
    no_socket: Annotated[
        bool, _option("Listen on TCP only.", "--no-socket", panel=Listening)
    ] = False,
    tls_cert: Annotated[
        Path | None,
        _option("Certificate chain (PEM) for TLS on TCP.", "--tls-cert", panel=Listening),
    ] = None,
    tls_key: Annotated[
        Path | None, _option("Its private key (PEM).", "--tls-key", panel=Listening)
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        _option(
            "Demand client certificates of this authority (mTLS).",
            "--tls-client-ca",
            panel=Listening,
        ),
    ] = None,
    no_lane: Annotated[
        bool,
        _option("Let no client attach: no calls through shared memory.", "--no-lane", panel=Lane),
    ] = False,
    lane_uid: Annotated[
        list[str] | None,
        _option(
            "A user who may attach. Repeatable; 'any' for all. \\[default: the server's own]",
            "--lane-uid",
            panel=Lane,
            metavar="UID",
        ),
    ] = None,
    max_sessions: Annotated[
        int, _option("Clients attached at once.", "--max-sessions", panel=Lane)
    ] = _SESSIONS.sessions_max,
    max_sessions_per_uid: Annotated[
        int,
        _option("The same, of one user.", "--max-sessions-per-uid", panel=Lane),
    ] = _SESSIONS.sessions_per_uid_max,
    lane_memory_mib: Annotated[
        int,
        _option(
            "Shared memory of all clients together; one user gets half of it.",
            "--lane-memory-mib",
            panel=Lane,
        ),
    ] = _SESSIONS.arena_bytes_total_max // MIB,
    huge_pages: Annotated[
        bool,
        _option(
            "Make shared memory of 2 MiB pages, as far as the host has set some aside.",
            "--huge-pages",
            panel=Lane,
        ),
    ] = False,
    model_control: Annotated[
        ModelControlMode,
        _option(
            "none: load everything at the start. explicit: load and unload on demand. "
            "poll: follow the repository's files.",
            "--model-control",
            panel=Models,
        ),
    ] = ModelControlMode.NONE,
    load_model: Annotated[
        list[str] | None,
        _option(
            "With explicit control: load this model at the start. Repeatable; '*' for all.",
            "--load-model",
            panel=Models,
            metavar="NAME",
        ),
    ] = None,
    poll_interval: Annotated[
        float,
        _option("Seconds between two looks at the repository.", "--poll-interval", panel=Models),
    ] = 2.0,
    derive_batching: Annotated[
        int,
        _option(
            "Batch up to this many rows in models without a configuration, where a proof at load "
            "shows that batched and single rows agree. 0: off.",
            "--derive-batching",
            panel=Models,
            metavar="ROWS",
        ),
    ] = 0,
    suggest_config: Annotated[
        bool,
        _option(
            "Print the configuration that each model would get, with what was derived, and exit.",
            "--suggest-config",
            panel=Models,
        ),
    ] = False,
    threads: Annotated[
        int,
        _option("CPU threads for the models together. 0: one per core.", "--threads", panel=Models),
    ] = 0,
    devices: Annotated[
        list[str] | None,
        _option(
            "A GPU to run models on, by UUID or number. Repeatable; 'auto' for all there are, "
            "'cpu' for none. The CPU is always there. \\[default: auto]",
            "--devices",
            panel=Models,
            metavar="UUID|NUMBER|auto|cpu",
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        _option(
            "Where plans are kept. \\[default: thirdrail/plans in the user's cache folder]",
            "--cache-dir",
            panel=Compiling,
        ),
    ] = None,
    cache_gib: Annotated[
        float,
        _option(
            "Its size; what was not used for longest leaves first.", "--cache-gib", panel=Compiling
        ),
    ] = _COMPILING.cache_bytes_max / GIB,
    read_only_cache: Annotated[
        list[Path] | None,
        _option(
            "Another cache, filled elsewhere, that is looked into as well. Repeatable.",
            "--read-only-cache",
            panel=Compiling,
        ),
    ] = None,
    build_minutes_max: Annotated[
        float, _option("How long one build may take.", "--build-minutes-max", panel=Compiling)
    ] = _COMPILING.build_s_max / 60,
    build_memory_gib: Annotated[
        float,
        _option("Memory of one build. 0: no limit.", "--build-memory-gib", panel=Compiling),
    ] = 0.0,
    builds_at_once: Annotated[
        int, _option("Builds at once.", "--builds-at-once", panel=Compiling)
    ] = _COMPILING.builds_at_once_max,
    fallback: Annotated[
        bool,
        _option(
            "Whether a model whose first engine cannot be had is served by another one, visibly, "
            "where its configuration says nothing (on_compile_failure).",
            "--fallback/--no-fallback",
            panel=Compiling,
        ),
    ] = True,
    memory_gib: Annotated[
        float,
        _option(
            "Memory of the models on the CPU together, while nothing runs. 0: no budget.",
            "--memory-gib",
            panel=Memory,
        ),
    ] = 0,
    device_memory_gib: Annotated[
        float,
        _option("The same for each GPU, of its own memory.", "--device-memory-gib", panel=Memory),
    ] = 0,
    over_budget: Annotated[
        OverBudget,
        _option(
            "A model that does not fit. refuse: is not loaded. evict: idle models make room, the "
            "least recently used first.",
            "--over-budget",
            panel=Memory,
        ),
    ] = OverBudget.REFUSE,
    swap: Annotated[
        SwapOverBudget,
        _option(
            "A reload that does not fit beside what serves. refuse: is not done. unload-first: the "
            "model is not served meanwhile.",
            "--swap",
            panel=Memory,
        ),
    ] = SwapOverBudget.REFUSE,
    evict_after: Annotated[
        int,
        _option(
            "Seconds since its last request or load before a model counts as idle.",
            "--evict-after",
            panel=Memory,
        ),
    ] = _MEMORY.spared_s,
    max_message_mib: Annotated[
        int, _option("Largest message, each way.", "--max-message-mib", panel=Limits)
    ] = 64,
    max_calls: Annotated[
        int,
        _option("Calls and streams at once, all clients together.", "--max-calls", panel=Limits),
    ] = 1024,
    max_connections: Annotated[
        int, _option("Connections at once.", "--max-connections", panel=Limits)
    ] = 1024,
    max_stream_requests: Annotated[
        int,
        _option("Requests in flight per stream.", "--max-stream-requests", panel=Limits),
    ] = 64,
    max_queue: Annotated[
        int,
        _option(
            "Waiting requests per model, where its configuration says nothing.",
            "--max-queue",
            panel=Limits,
        ),
    ] = 1024,
    busy_poll_us: Annotated[
        int,
        _option(
            "How long a process looks for news before it sleeps, where news has come that fast; "
            "0 never looks. Saves wake-ups, costs at most this much of a core for each wait.",
            "--busy-poll-us",
            panel=Operation,
        ),
    ] = LONGEST_US,
    shutdown_seconds: Annotated[
        float,
        _option(
            "How long requests in flight may take after SIGTERM.",
            "--shutdown-seconds",
            panel=Limits,
        ),
    ] = 30.0,
    metrics_port: Annotated[
        int | None,
        _option(
            "Serve Prometheus /metrics on this port. \\[default: off]",
            "--metrics-port",
            panel=Operation,
        ),
    ] = None,
    metrics_host: Annotated[
        str, _option("The address for it.", "--metrics-host", panel=Operation)
    ] = "127.0.0.1",
    server_name: Annotated[
        str,
        _option(
            "What KServe clients are told the server is called.", "--server-name", panel=Operation
        ),
    ] = "thirdrail",
    ready_when: Annotated[
        str,
        _option(
            "all-models: ready when every startup model is. live: as soon as calls are answered.",
            "--ready-when",
            panel=Operation,
        ),
    ] = "all-models",
    compress: Annotated[
        bool, _option("Compress responses with gzip.", "--compress", panel=Operation)
    ] = False,
    allow_client_shm: Annotated[
        bool,
        _option(
            "Let KServe clients register shared memory: files in /dev/shm of the server's user and "
            "of --lane-uid. Whoever may call the server may then have them read and written.",
            "--allow-client-shm",
            panel=Operation,
        ),
    ] = False,
    channelz: Annotated[
        bool, _option("Offer gRPC's channelz debugging service.", "--channelz", panel=Operation)
    ] = False,
    log_level: Annotated[
        str, _option("debug, info, warning or error.", "--log-level", panel=Operation)
    ] = "info",
    log_format: Annotated[
        str, _option("text, or json: one object a line.", "--log-format", panel=Operation)
    ] = "text",
) -> None:
    """Serve the models of a repository over gRPC to the services of this host.

    \b
    thirdrail serve models/                       # 127.0.0.1:8001 and the user's Unix socket
    thirdrail serve models/ --no-tcp              # the Unix socket only
    thirdrail serve models/ --model-control explicit --load-model digits

    Stop it with Ctrl-C or SIGTERM: it finishes what it has taken on first.
    """
    _require_packages()
    tls = _tls_files(tls_cert, tls_key, tls_client_ca)
    _configure_logs(log_level, log_format)
    try:
        config = ServerConfig(
            repository=repository,
            address=None if no_tcp else address,
            socket=None if no_socket else socket or _default_socket(),
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
            strict_readiness=_is_strict(ready_when),
            message_bytes_max=max_message_mib * MIB,
            concurrent_calls_max=max_calls,
            connections_max=max_connections,
            stream_requests_in_flight_max=max_stream_requests,
            shutdown_s_max=shutdown_seconds,
            devices=_devices(devices),
            memory=MemoryBudget(
                round(memory_gib * GIB),
                over_budget,
                swap,
                evict_after,
                round(device_memory_gib * GIB),
            ),
            busy_poll_us=busy_poll_us,
            worker=WorkerConfig(
                busy_poll_us=busy_poll_us,
                threads_max=threads,
                queue_requests_max=max_queue,
                derive_batch_rows=derive_batching,
                compiling=CompileConfig(
                    cache_dir=cache_dir.absolute() if cache_dir else _default_cache(),
                    cache_bytes_max=round(cache_gib * GIB),
                    read_only_caches=tuple(each.absolute() for each in read_only_cache or ()),
                    build_s_max=build_minutes_max * 60,
                    build_memory_bytes_max=round(build_memory_gib * GIB),
                    builds_at_once_max=builds_at_once,
                    falls_back=fallback,
                ),
                sessions=SessionLimits(
                    uids=_uids(lane_uid),
                    sessions_max=max_sessions,
                    sessions_per_uid_max=max_sessions_per_uid,
                    arena_bytes_total_max=lane_memory_mib * MIB,
                    arena_bytes_per_uid_max=lane_memory_mib * MIB // 2,
                    huge_pages=huge_pages,
                ),
            ),
        )
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


def _tls_files(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise typer.BadParameter("TLS needs both --tls-cert and --tls-key")
    return TlsFiles(cert, key, client_ca)


def _default_socket() -> Path:
    from thirdrail.discovery import default_socket_path

    return default_socket_path()


def _default_cache() -> Path | None:
    from thirdrail_engines.plan_cache import default_folder

    try:
        return default_folder()
    except RuntimeError:  # a user without a home folder
        return None


def _uids(texts: list[str] | None) -> tuple[int, ...] | None:
    if not texts:
        return _SESSIONS.uids
    if "any" in texts:
        return None
    for text in texts:
        if not (text.isascii() and text.isdecimal()):
            raise ConfigError(f"--lane-uid takes a user's number, or any, got '{text}'")
    return tuple(map(int, texts))


def _devices(texts: list[str] | None) -> tuple[str, ...] | None:
    """The GPUs that are named; None: all there are."""
    names = [name.strip() for text in texts or ["auto"] for name in text.split(",")]
    if "auto" in names:
        if len(names) > 1:
            raise ConfigError("--devices auto means all GPUs, it stands alone")
        return None
    if "" in names:
        raise ConfigError("--devices takes auto, cpu, UUIDs and numbers, got an empty name")
    return tuple(name for name in names if name != "cpu")


def _is_strict(ready_when: str) -> bool:
    if ready_when not in ("all-models", "live"):
        raise ConfigError(f"--ready-when takes all-models or live, got '{ready_when}'")
    return ready_when == "all-models"


def _configure_logs(level: str, form: str) -> None:
    from thirdrail_server.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, configure_logging

    if level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(f"--log-level takes debug, info, warning or error, got '{level}'")
    if form not in ("text", "json"):
        raise typer.BadParameter(f"--log-format takes text or json, got '{form}'")
    os.environ[LEVEL_VARIABLE], os.environ[FORMAT_VARIABLE] = level, form
    configure_logging(process="front")
