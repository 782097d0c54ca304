# SPDX-License-Identifier: Apache-2.0
"""Every setting and every bound of the server, in one place, checked when built.

The worst case in memory: the front holds at most `concurrent_calls_max` requests, and each stream
at most `stream_requests_in_flight_max`, of `message_bytes_max` each; tensors in arenas never exceed
`input_arena_bytes_max + output_arena_bytes_max` per lane session, nor `arena_bytes_total_max` for
all sessions but the front's; engines take what their models take.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from thirdrail.lane.busy_poll import LONGEST_US

MIB = 1 << 20
GIB = 1 << 30
PORT_MAX = 65535
UID_MAX = 2**32 - 1  # this one means "none" to the kernel
THREADS_MAX = 4096  # of engines; far beyond, a load makes threads for minutes
GRPC_BOUND_MAX = 2_000_000_000  # gRPC's own numbers have 32 bits


class ConfigError(Exception):
    """A setting is wrong. The text names it, what was expected and what came."""


def _require(settings: object, name: str, least: int, most: float = math.inf) -> None:
    value = getattr(settings, name)
    if not value >= least:  # so that nan is refused as well
        raise ConfigError(f"{name} must be {least} or more, got {value}")
    if value > most:
        raise ConfigError(f"{name} must be at most {most}, got {value}")


def bytes_of_gib(name: str, gib: float) -> int:
    """name: the setting's. Raises ConfigError for what is no amount."""
    if not 0 <= gib * GIB < math.inf:  # so that nan is refused as well
        raise ConfigError(f"{name} must be a number of GiB, 0 or more, got {gib}")
    return round(gib * GIB)


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of HOST:PORT; an IPv6 host keeps its brackets. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    is_number = port.isascii() and port.isdecimal()
    if not host or not is_number or int(port) > PORT_MAX or (":" in host and host[0] != "["):
        raise ConfigError(
            f"an address must be HOST:PORT with a port from 0 (any free one) to {PORT_MAX}, for "
            f"example 127.0.0.1:8001 or [::1]:8001, got '{address}'"
        )
    return host, int(port)


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """What one lane session may use. The worker tells them to the client when it attaches."""

    packet_bytes_max: int = 64 << 10
    inline_bytes_max: int = 16 << 10
    calls_in_flight_max: int = 4096
    input_arena_bytes_max: int = 1 << 30
    output_arena_bytes_max: int = 1 << 30
    model_ids_max: int = 1024
    alone_chunks_max: int = 128  # input chunks for one tensor; each holds a file descriptor


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What lane sessions may have of a worker's device. The front's own lane has nothing of it."""

    places_max: int = 64  # requests of a session at once that have tensors on the device
    input_arena_bytes_max: int = 1 << 30
    output_arena_bytes_max: int = 1 << 30
    arena_bytes_per_uid_max: int = 2 << 30
    arena_bytes_total_max: int = 4 << 30

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            _require(self, each.name, 1)


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Who may attach to a worker, and what all its sessions together may use. The front's own lane
    counts for none of it.
    """

    uids: tuple[int, ...] | None = ()  # who may attach; (): the worker's own uid; None: anybody
    sessions_max: int = 256
    sessions_per_uid_max: int = 64
    tokens_pending_max: int = 64  # issued, and not used yet
    token_life_ms: int = 5000
    hello_ms_max: int = 5000  # from connecting to the hello
    arena_bytes_total_max: int = 8 << 30
    arena_bytes_per_uid_max: int = 4 << 30
    # Memory of a client that broke off and cannot be watched is kept apart for so long.
    quarantine_ms: int = 2000
    huge_pages: bool = False  # try pages of 2 MiB, which the host must have set aside

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if each.name not in ("uids", "huge_pages"):
                _require(self, each.name, 1)
        for uid in self.uids or ():
            if not 0 <= uid < UID_MAX:
                raise ConfigError(f"uids must be user ids from 0 to {UID_MAX - 1}, got {uid}")


@dataclass(frozen=True, slots=True)
class ExportLimits:
    """What clients may hand to each other in one worker. Each tensor holds a file descriptor."""

    exports_per_session_max: int = 256  # offered, or taken and not given back yet
    imports_per_session_max: int = 256
    exports_total_max: int = 1024
    bytes_per_session_max: int = 1 << 30
    bytes_total_max: int = 4 << 30
    life_ms_default: int = 60_000  # of a token that nobody has used
    life_ms_max: int = 3_600_000
    hops_max: int = 16  # an importer may export again so many times in a row

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            _require(self, each.name, 1)
        if self.life_ms_default > self.life_ms_max:
            raise ConfigError(
                f"life_ms_default must be at most life_ms_max, {self.life_ms_max}, got "
                f"{self.life_ms_default}"
            )


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """Building plans, and keeping them."""

    cache_dir: Path | None = None  # None: plans are not kept
    cache_bytes_max: int = 20 << 30
    read_only_caches: tuple[Path, ...] = ()  # asked for what the first does not have
    build_s_max: float = 1800.0  # of one build; waiting for its turn does not count
    build_memory_bytes_max: int = 0  # of one build; 0: no limit
    builds_at_once_max: int = 1
    falls_back: bool = True  # to another engine, for models that say nothing about it
    # Loads that may build: each waits in a thread of its own, so that others are not held up.
    loads_at_once_max: int = 8

    def __post_init__(self) -> None:
        if self.cache_bytes_max < 1:
            raise ConfigError(f"cache_bytes_max must be above 0, got {self.cache_bytes_max}")
        _require(self, "build_memory_bytes_max", 0)
        _require(self, "builds_at_once_max", 1)
        _require(self, "loads_at_once_max", 1)
        if not self.build_s_max > 0:
            raise ConfigError(f"build_s_max must be above 0, got {self.build_s_max}")

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "CompileConfig":
        """Of what JSON made of one."""
        folder = values["cache_dir"]
        values["cache_dir"] = None if folder is None else Path(folder)
        values["read_only_caches"] = tuple(map(Path, values["read_only_caches"]))
        return cls(**values)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker process needs to know; the front passes it as JSON."""

    name: str = "cpu"
    device: str = ""  # the UUID of the GPU that its engines run on; empty: the CPU
    lane: LaneLimits = field(default_factory=LaneLimits)
    lane_device: DeviceLimits = field(default_factory=DeviceLimits)
    sessions: SessionLimits = field(default_factory=SessionLimits)
    exports: ExportLimits = field(default_factory=ExportLimits)
    compiling: CompileConfig = field(default_factory=CompileConfig)
    threads_max: int = 0  # CPU threads that engines may use together; 0: one per core
    queue_requests_max: int = 1024  # per model version, where its configuration says nothing
    derive_batch_rows: int = 0  # 2 or more: models without a configuration batch, where proven
    loads_at_once_max: int = 2
    drain_s_max: float = 30.0  # requests of a replaced or unloaded model may take so long to finish
    # A model runs on the worker's own loop, sparing a thread switch, if 99 of 100 trial runs take
    # no longer than this, and until a run takes longer than the second bound. CPU time, so that a
    # busy host counts not. Where trials cannot tell, the runs of its callers do: see RunHistory.
    inline_run_us_max: int = 200  # about what two switches of threads cost on a virtual machine
    inline_overrun_us_max: int = 1000
    busy_poll_us: int = LONGEST_US  # how long the loop looks for news before it sleeps; 0: never

    def __post_init__(self) -> None:
        _require(self, "threads_max", 0, THREADS_MAX)
        _require(self, "busy_poll_us", 0)
        _require(self, "queue_requests_max", 1)
        _require(self, "loads_at_once_max", 1)
        if self.derive_batch_rows < 0 or self.derive_batch_rows == 1:
            raise ConfigError(
                f"derive_batch_rows must be 0 (off) or 2 or more, got {self.derive_batch_rows}"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=os.fspath)

    @classmethod
    def from_json(cls, text: str) -> "WorkerConfig":
        values: dict[str, Any] = json.loads(text)
        sessions = values["sessions"]
        if sessions["uids"] is not None:
            sessions["uids"] = tuple(sessions["uids"])
        values |= {
            "lane": LaneLimits(**values["lane"]),
            "lane_device": DeviceLimits(**values["lane_device"]),
            "sessions": SessionLimits(**sessions),
            "exports": ExportLimits(**values["exports"]),
            "compiling": CompileConfig.from_values(values["compiling"]),
        }
        return cls(**values)


@dataclass(frozen=True, slots=True)
class ControlLimits:
    """The bounds of the control plane: workers' lives, loads, watchers."""

    restart_delay_ms_min: int = 100  # before the first restart of a worker; doubles with each
    restart_delay_ms_max: int = 30_000
    restart_stable_s: int = 60  # a worker that lived so long starts over at the smallest delay
    worker_start_s_max: int = 60  # from its start to its first answer
    worker_stop_s_max: int = 10  # from hanging up to SIGKILL
    worker_answer_s_max: int = 5  # for figures, and to any question while the server stops
    worker_silence_s_max: int = 30  # a worker whose loop answers nothing for so long is replaced
    models_max: int = 10_000  # known by name, broken and unloaded ones included
    waiting_per_model_max: int = 16  # loads and unloads of one model in line
    watchers_max: int = 256  # watches of models and of health, all connections together
    upload_files_max: int = 64  # `file:` overrides of one load

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            _require(self, each.name, 1)
        if self.restart_delay_ms_min > self.restart_delay_ms_max:
            raise ConfigError(
                f"restart_delay_ms_min must be at most restart_delay_ms_max, "
                f"{self.restart_delay_ms_max}, got {self.restart_delay_ms_min}"
            )


class OverBudget(StrEnum):
    REFUSE = "refuse"
    EVICT = "evict"  # idle models leave, the least recently used first


class SwapOverBudget(StrEnum):
    REFUSE = "refuse"  # the old engine goes on serving
    UNLOAD_FIRST = "unload-first"  # the model is not served meanwhile


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What the engines of one worker may hold in memory together; see docs/placement.md."""

    bytes_max: int = 0  # of the CPU's worker; 0: there is no budget
    over_budget: OverBudget = OverBudget.REFUSE
    swap: SwapOverBudget = SwapOverBudget.REFUSE
    spared_s: int = 10  # a model that was loaded or used within so many seconds is not evicted
    device_bytes_max: int = 0  # of each GPU's, in that device's own figures; 0: there is none

    def __post_init__(self) -> None:
        _require(self, "bytes_max", 0)
        _require(self, "device_bytes_max", 0)
        _require(self, "spared_s", 0)


@dataclass(frozen=True, slots=True)
class RegionLimits:
    """Of KServe's shared memory: the regions that clients register, all of them together."""

    regions_max: int = 256  # each keeps a file open
    name_chars_max: int = 256

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            _require(self, each.name, 1)


class ModelControlMode(StrEnum):
    NONE = "none"  # all models of the repository are loaded at the start, and that is all
    EXPLICIT = "explicit"  # models are loaded and unloaded by calls
    POLL = "poll"  # models follow the repository's files


@dataclass(frozen=True, slots=True)
class TlsFiles:
    certificate: Path
    key: Path
    client_ca: Path | None = None  # given: clients must show a certificate of this authority


@dataclass(frozen=True, slots=True)
class ServerConfig:
    repository: Path
    address: str | None = "127.0.0.1:8001"  # None: no TCP
    socket: Path | None = None  # None: no Unix socket
    lane: bool = True  # clients on this host may attach; needs the Unix socket
    tls: TlsFiles | None = None  # for TCP; the Unix socket is protected by its folder's mode
    model_control: ModelControlMode = ModelControlMode.NONE
    devices: tuple[str, ...] | None = None  # GPUs by UUID or number; None: all that are found
    load_models: tuple[str, ...] = ()  # explicit mode: loaded at the start; "*" for all
    poll_interval_s: float = 2.0
    server_name: str = "thirdrail"  # what ServerMetadata says; some foreign tests expect "triton"
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    channelz: bool = False
    compress: bool = False  # gzip for responses; compressed requests are always understood
    strict_readiness: bool = True  # ready only when every startup model is

    # Whoever may call the server may then have it read and write shared memory of this host.
    allow_client_shm: bool = False

    message_bytes_max: int = 64 * MIB
    concurrent_calls_max: int = 1024  # calls and streams at once, all connections together
    connections_max: int = 1024
    stream_requests_in_flight_max: int = 64
    upload_bytes_max: int = 64 * MIB  # all `file:` overrides of one load
    shutdown_s_max: float = 30.0
    busy_poll_us: int = LONGEST_US  # as in WorkerConfig
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    control: ControlLimits = field(default_factory=ControlLimits)
    regions: RegionLimits = field(default_factory=RegionLimits)
    memory: MemoryBudget = field(default_factory=MemoryBudget)

    def __post_init__(self) -> None:
        if self.address is None and self.socket is None:
            raise ConfigError("the server needs an address or a socket to listen on, got neither")
        if self.address is not None:
            host_and_port(self.address)
        if self.metrics_port is not None and not 0 <= self.metrics_port <= PORT_MAX:
            raise ConfigError(f"metrics_port must be 0 to {PORT_MAX}, got {self.metrics_port}")
        for name in ("message_bytes_max", "stream_requests_in_flight_max", "upload_bytes_max"):
            _require(self, name, 1)
        for name in ("concurrent_calls_max", "connections_max"):
            _require(self, name, 1, GRPC_BOUND_MAX)
        _require(self, "shutdown_s_max", 0)
        _require(self, "busy_poll_us", 0)
        if not self.poll_interval_s > 0:
            raise ConfigError(f"poll_interval_s must be above 0, got {self.poll_interval_s}")
        if self.message_bytes_max > 2**31 - 1:
            raise ConfigError("message_bytes_max must be below 2 GiB, the most that gRPC can carry")
        is_explicit = self.model_control is ModelControlMode.EXPLICIT
        if self.memory.over_budget is OverBudget.EVICT and not is_explicit:
            raise ConfigError(
                "over_budget evict needs model_control explicit; in the other modes nobody could "
                "load an evicted model again"
            )
        if self.load_models and not is_explicit:
            raise ConfigError(
                "load_models needs model_control explicit; in the other modes every model is loaded"
            )
