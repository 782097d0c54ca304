# SPDX-License-Identifier: Apache-2.0
"""What large tensors cost when they come over gRPC: 1 and 16 MiB, beside the echo of the same."""

from collections.abc import Iterator

import grpc

from bench import models, servers
from bench.identity import TRANSPORTS, contender
from bench.load import UNLIMITED, Job, LoadGenerator
from bench.measure import Series, interleave, ratio
from bench.options import Options
from bench.report import Table
from thirdrail.v1 import inference_pb2, inference_pb2_grpc

QUESTION = "1 and 16 MiB tensors over the wire, beside the echo of the same bytes"

SIZES_MIB = (1, 16)
COLUMNS = ("", "p50 ms", "p99 ms", "calls/s", "server CPU ms/call", "copies", "p50 to echo")


def run(options: Options) -> Iterator[Table]:
    repository = options.folder / "models"
    models.write_identity(repository)
    with (
        servers.thirdrail(repository, options.folder) as ours,
        servers.echo("aio", options.folder) as echo,
        LoadGenerator() as load,
    ):
        for size_mib in SIZES_MIB:
            request = models.request("identity", "x", models.floats(size_mib << 20))
            for transport in TRANSPORTS:
                contenders = [
                    contender(load, each, Job(each.address(transport), request, 1))
                    for each in (ours, echo)
                ]
                series = interleave(contenders, options.seconds)
                copies = _copies(ours, request)
                yield _table(f"identity {size_mib} MiB, {transport}", series, copies)


def _table(title: str, series: list[Series], copies: int) -> Table:
    ours, echo = series
    rows = []
    for each in series:
        rows.append(
            (
                each.name,
                f"{each.percentile_us(50) / 1e3:.2f}",
                f"{each.percentile_us(99) / 1e3:.2f}",
                f"{each.calls_per_s:.0f}",
                " + ".join(f"{us / 1e3:.2f}" for us in each.server_cpu_us),
                str(copies) if each is ours else "",
                ratio(ours, echo, lambda one: one.p50_us).text() if each is ours else "",
            )
        )
    return Table(
        title,
        "Unary, 1 in flight, the bytes go both ways. Client: generated synchronous stub in a "
        "process of its own. CPU: front + worker. Copies: of tensor bytes, each way together, what "
        "the reply's timing counts; those inside gRPC and, for the echo, protobuf come on top.",
        COLUMNS,
        rows,
    )


def _copies(server: servers.Server, request: bytes) -> int:
    with grpc.insecure_channel(server.unix, UNLIMITED) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        return stub.Infer(inference_pb2.InferRequest.FromString(request)).timing.copies
