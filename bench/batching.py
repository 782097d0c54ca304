# SPDX-License-Identifier: Apache-2.0
"""What dynamic batching brings: an MLP for 64 callers, beside the bare engine and beside the front.

Two things can limit the server: how many rows the engine computes, and how many messages the front
moves. The first is measured with ONNX Runtime alone, the second with an identity model of the same
message size under the same load.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np

from bench import models, servers
from bench.identity import contender
from bench.load import Job, LoadGenerator
from bench.measure import Contender, Series, Slice, as_latencies, interleave, ratio
from bench.options import Options
from bench.report import Table
from thirdrail.tensors import Array
from thirdrail.v1 import metrics_pb2, metrics_pb2_grpc
from thirdrail_engines.onnxruntime_session import open_session
from thirdrail_engines.options import EngineOptions

QUESTION = "dynamic batching: an MLP for 64 callers beside the bare engine; Magika's CPU per item"

CALLERS = 64
BARE_ROWS = (1, 2, 4, 8, 16)
MAGIKA_FOLDER = Path(".demo/models")
MAGIKA_FETCH = "python -m thirdrail_server.demo --fetch-only"
MAGIKA_TOKENS = 2048
MAGIKA_CALLERS = (1, 16)  # at 100 items a second, more would not come round within a slice
# Where front, engine and load share the cores, a second thread for each run takes one from others.
ONE_THREAD = 'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'
LOAD = f"{CALLERS} callers, each with a stream of its own and one request of one row in flight"


def run(options: Options) -> Iterator[Table]:
    repository = options.folder / "models"
    models.write_identity(repository)
    mlp = models.write_mlp(repository)
    models.write_mlp(repository, "mlp_one_thread", ONE_THREAD)
    with (
        servers.thirdrail(repository, options.folder) as server,
        LoadGenerator() as load,
    ):
        yield from _mlp(options, server, load, mlp)
    if (MAGIKA_FOLDER / "magika").is_dir():
        yield _magika(options)
    else:
        yield Table("Magika", f"Not measured: no {MAGIKA_FOLDER}; run {MAGIKA_FETCH}", ())


def _mlp(
    options: Options, server: servers.Server, load: LoadGenerator, mlp: Path
) -> Iterator[Table]:
    row = np.ones((1, models.MLP_WIDTH), np.float32)
    served, sparing = (
        Job(server.unix, models.request(name, "x", row), CALLERS, CALLERS)
        for name in ("mlp", "mlp_one_thread")
    )
    message = models.floats(row.nbytes)
    ceiling = Job(server.unix, models.request("identity", "x", message), CALLERS, CALLERS)
    bare = {rows: _bare(mlp, "x", np.repeat(row, rows, axis=0)) for rows in BARE_ROWS}
    contenders = [
        contender(load, server, served),
        contender(load, server, sparing),
        contender(load, server, ceiling),
        *(Contender(f"bare engine, batch {rows}", bare[rows]) for rows in BARE_ROWS),
    ]
    before = _batches(server, "mlp")
    series = interleave(contenders, options.seconds)
    formed = _batches(server, "mlp") - before
    yield _mlp_table(series)
    yield _batch_table(formed)


def _mlp_table(series: list[Series]) -> Table:
    def rate(each: Slice) -> float:
        return each.calls_per_s

    mlp, sparing, front = series[:3]
    mlp.name, sparing.name = "MLP served", "MLP served, one thread a run"
    front.name = "front's ceiling: identity"
    columns = (
        "", "rows/s", "p50 us", "p99 us", "CPU us/row", "MLP served to this", "with one thread",
    )  # fmt: skip
    rows = []
    for each in series:
        cpu = each.server_cpu_us or [each.client_cpu_us]
        rows.append(
            (
                each.name,
                f"{each.calls_per_s:.0f}",
                f"{each.percentile_us(50):.0f}",
                f"{each.percentile_us(99):.0f}",
                " + ".join(f"{us:.0f}" for us in cpu),
                "" if each in (mlp, sparing) else ratio(mlp, each, rate).text(),
                "" if each in (mlp, sparing) else ratio(sparing, each, rate).text(),
            )
        )
    return Table(
        f"MLP {models.MLP_LAYERS} x {models.MLP_WIDTH}x{models.MLP_WIDTH}",
        f"{LOAD}, UDS, 4 KiB a row each way; max_batch_size {models.MLP_ROWS_MAX}, delay "
        f"{models.MLP_DELAY_US} us. Client: generated synchronous stub in a process of its own. "
        "Bare: ONNX Runtime alone in one process, its latency is that of a batch. "
        "CPU: front + worker, or the bare engine's.",
        columns,
        rows,
    )


class _Batches(dict[int, int]):
    """Rows in a batch -> how many batches."""

    def __sub__(self, earlier: "_Batches") -> "_Batches":
        return _Batches({rows: count - earlier.get(rows, 0) for rows, count in self.items()})

    @property
    def mean_rows(self) -> float:
        return sum(rows * count for rows, count in self.items()) / max(1, sum(self.values()))


def _batches(server: servers.Server, model: str) -> _Batches:
    with grpc.insecure_channel(server.unix) as channel:
        snapshot = metrics_pb2_grpc.MetricsStub(channel).Snapshot(metrics_pb2.SnapshotRequest())
    (counters,) = (each for each in snapshot.models if each.name == model)
    return _Batches({each.rows: each.batches for each in counters.batch_sizes})


def _batch_table(formed: _Batches) -> Table:
    total = sum(formed.values())
    rows = [
        (str(size), str(count), f"{count / total:.1%}")
        for size, count in sorted(formed.items())
        if count
    ]
    return Table(
        "batches that formed for the MLP",
        f"From Metrics.Snapshot, over the slices above; mean {formed.mean_rows:.1f} rows.",
        ("rows", "batches", "share"),
        rows,
    )


def _bare(model: Path, name: str, batch: Array) -> Callable[[float], Slice]:
    """ONNX Runtime alone, as the worker sets it up. A call is a row."""
    session = open_session(model, EngineOptions(threads_max=os.cpu_count() or 1))

    def run_slice(seconds: float) -> Slice:
        latencies: list[int] = []
        cpu_started, started_ns = time.process_time(), time.monotonic_ns()
        now_ns, until_ns = started_ns, started_ns + int(seconds * 1e9)
        while now_ns < until_ns:
            session.run(None, {name: batch})
            before_ns, now_ns = now_ns, time.monotonic_ns()
            latencies += [now_ns - before_ns] * len(batch)
        elapsed_s = (now_ns - started_ns) / 1e9
        return Slice(as_latencies(latencies), elapsed_s, time.process_time() - cpu_started)

    return run_slice


def _magika(options: Options) -> Table:
    """Served with batching beside the bare engine at the batch size that formed."""
    rows = []
    item = np.arange(MAGIKA_TOKENS, dtype=np.int32)[None] % 256
    model = MAGIKA_FOLDER / "magika" / "1" / "model.onnx"
    with contextlib.ExitStack() as stack:
        repository = options.folder / "magika-only"
        shutil.copytree(MAGIKA_FOLDER / "magika", repository / "magika")
        server = stack.enter_context(servers.thirdrail(repository, options.folder))
        load = stack.enter_context(LoadGenerator())
        for callers in MAGIKA_CALLERS:
            job = Job(server.unix, models.request("magika", "bytes", item), callers, callers)
            before = _batches(server, "magika")
            load.run(job, 1.0)
            mean = max(1, round((_batches(server, "magika") - before).mean_rows))
            bare = Contender(
                f"bare engine, batch {mean}", _bare(model, "bytes", np.repeat(item, mean, axis=0))
            )
            served, alone = interleave([contender(load, server, job), bare], options.seconds)
            front, worker = served.server_cpu_us
            rows.append(
                (
                    str(callers),
                    f"{served.calls_per_s:.0f}",
                    str(mean),
                    f"{front:.0f}",
                    f"{worker:.0f}",
                    f"{alone.client_cpu_us:.0f}",
                    f"{front + worker - alone.client_cpu_us:.0f}",
                )
            )
    return Table(
        "Magika, CPU for one item",
        "One file's 2048 tokens (8 KiB) a request, streams over UDS; the bare engine runs the same "
        "rows in batches of the size that formed.",
        (
            "callers",
            "items/s",
            "mean batch",
            "front us",
            "worker us",
            "bare engine us",
            "added us",
        ),
        rows,
    )
