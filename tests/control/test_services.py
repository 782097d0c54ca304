# SPDX-License-Identifier: Apache-2.0
"""Models, Health and Metrics: a real gRPC server over a Unix socket, a real worker process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from thirdrail.statuses import REASON_KEY
from thirdrail.v1 import (
    inference_pb2,
    metrics_pb2,
    metrics_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    sessions_pb2,
)
from thirdrail_server.front.control import metrics_service
from thirdrail_server.front.control.access import ControlAccess
from thirdrail_server.front.control.health import SERVER_NAMES, HealthServicer
from thirdrail_server.front.control.metrics_service import MetricsEndpoint, MetricsServicer
from thirdrail_server.front.control.models_service import ModelsServicer
from thirdrail_server.inference import grpc_service_pb2
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
EXPLICIT: dict[str, Any] = {"model_control": "explicit"}


class Stubs:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.models: models_pb2_grpc.ModelsAsyncStub = models_pb2_grpc.ModelsStub(channel)  # type: ignore[assignment]
        self.metrics: metrics_pb2_grpc.MetricsAsyncStub = metrics_pb2_grpc.MetricsStub(channel)  # type: ignore[assignment]
        self.health = health_pb2_grpc.HealthStub(channel)

    async def check(self, service: str) -> int:
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)


class Registered:
    """What the metrics ask of the shared memory that clients have registered."""

    count = 2
    total_bytes = 4096


@contextlib.asynccontextmanager
async def serving(plane: Any, folder: Path) -> AsyncIterator[Stubs]:
    folder.chmod(0o700)
    path = folder / "grpc.sock"
    access = ControlAccess(plane.config.model_control, path)
    server = grpc.aio.server()
    models = ModelsServicer(plane.catalog, plane.control, access.authorize)
    models_pb2_grpc.add_ModelsServicer_to_server(models, server)
    figures = MetricsServicer(plane.control, Registered())
    metrics_pb2_grpc.add_MetricsServicer_to_server(figures, server)
    health = HealthServicer(plane.catalog, strict_readiness=True)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            yield Stubs(channel)
    finally:
        await server.stop(0)


async def states(stubs: Stubs, *, ready_only: bool = False) -> dict[str, tuple[int, str]]:
    listed = await stubs.models.List(models_pb2.ListRequest(ready_only=ready_only))
    return {each.name: (each.state, each.reason) for each in listed.models}


async def test_list_and_describe(repository: Any, open_plane: Any, tmp_path: Path) -> None:
    config = """
        max_batch_size: 8
        input { name: "x" dims: [3] data_type: TYPE_FP32 }
        output { name: "label" dims: [1] data_type: TYPE_STRING }
        instance_group { count: 2 }
    """
    repository.write("good", config=config)
    repository.write("bad", "bad")
    async with open_plane() as plane, serving(plane, tmp_path) as stubs:
        await plane.until(plane.is_settled)
        assert await states(stubs) == {
            "bad": (models_pb2.MODEL_STATE_UNAVAILABLE, "the file is damaged"),
            "good": (models_pb2.MODEL_STATE_READY, ""),
        }
        assert set(await states(stubs, ready_only=True)) == {"good"}

        told = await stubs.models.Describe(models_pb2.DescribeRequest(name="good"))
        assert (told.status.version, told.status.engine, told.status.worker) == (
            1,
            "nothing",
            "cpu",
        )
        assert list(told.ready_versions) == [1]
        assert [(spec.name, list(spec.shape)) for spec in told.inputs] == [("x", [-1, 3])]
        assert [(spec.name, list(spec.shape)) for spec in told.outputs] == [("label", [-1, 1])]
        assert (told.batch_rows_max, told.instances) == (8, 2)
        assert text_format.Parse(told.config_pbtxt, ModelConfig()).max_batch_size == 8
        assert list(told.warnings) == ["a field has no effect"]
        assert list(told.inputs_in_place) == ["x"]

        told = await stubs.models.Describe(models_pb2.DescribeRequest(name="bad"))
        assert told.status.reason == "the file is damaged"
        for name, version in (("none", 0), ("good", 2)):
            with pytest.raises(grpc.aio.AioRpcError, match="is not found") as failure:
                await stubs.models.Describe(models_pb2.DescribeRequest(name=name, version=version))
            assert failure.value.code() is grpc.StatusCode.NOT_FOUND
            assert (REASON_KEY, "REASON_NOT_FOUND") in [*failure.value.trailing_metadata()]


async def test_load_streams_its_progress_and_unload_ends_it(
    repository: Any, open_plane: Any, tmp_path: Path
) -> None:
    repository.write("m", "slow")
    repository.write("bad", "bad")
    async with open_plane(**EXPLICIT) as plane, serving(plane, tmp_path) as stubs:
        await plane.worker.wait_until_up()
        request = models_pb2.LoadRequest(name="m", config_pbtxt="max_batch_size: 16")
        reports = [report async for report in stubs.models.Load(request)]
        assert [report.phase for report in reports] == ["reading", "building", "ready"]
        assert [report.done for report in reports] == [False, False, True]
        assert list(reports[-1].versions) == [1]
        assert plane.catalog.find("m")[0].config.max_batch_size == 16
        await stubs.models.Unload(models_pb2.UnloadRequest(name="m"))
        assert not plane.catalog.is_ready("m")

        with pytest.raises(grpc.aio.AioRpcError, match="no version is available") as failure:
            _ = [r async for r in stubs.models.Load(models_pb2.LoadRequest(name="bad"))]
        assert failure.value.code() is grpc.StatusCode.INTERNAL
        request = models_pb2.LoadRequest(name="m", config_pbtxt="max_batch_size: many")
        with pytest.raises(grpc.aio.AioRpcError, match="config_pbtxt: line 1") as failure:
            _ = [r async for r in stubs.models.Load(request)]
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_caller_who_hangs_up_does_not_stop_the_load(
    repository: Any, open_plane: Any, tmp_path: Path
) -> None:
    repository.write("m", "slow")
    async with open_plane(**EXPLICIT) as plane, serving(plane, tmp_path) as stubs:
        await plane.worker.wait_until_up()
        call = stubs.models.Load(models_pb2.LoadRequest(name="m"))
        assert (await anext(aiter(call))).phase == "reading"
        call.cancel()
        await plane.until(lambda: plane.catalog.is_ready("m"))


async def test_control_is_off_by_default(repository: Any, open_plane: Any, tmp_path: Path) -> None:
    repository.write("m")
    async with open_plane() as plane, serving(plane, tmp_path) as stubs:
        with pytest.raises(grpc.aio.AioRpcError, match="--model-control explicit") as failure:
            await stubs.models.Unload(models_pb2.UnloadRequest(name="m"))
        assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_watch_tells_the_state_then_the_changes_then_the_end(
    repository: Any, open_plane: Any, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        repository.write(name)
    async with open_plane(**EXPLICIT) as plane, serving(plane, tmp_path) as stubs:
        await plane.worker.wait_until_up()
        call = stubs.models.Watch(models_pb2.WatchRequest(names=["a"]))
        watch = aiter(call)
        first = await anext(watch)
        assert (first.initial, first.status.name, first.status.reason) == (True, "a", "not loaded")
        for name in ("b", "a"):
            await plane.control.load(name)
        news = await anext(watch)
        while news.status.state != models_pb2.MODEL_STATE_READY:
            assert (news.initial, news.status.name) == (False, "a")
            news = await anext(watch)
        repository.write("a", version=2)
        await plane.control.load("a")
        versions: dict[int, int] = {}
        while versions.get(2) != models_pb2.MODEL_STATE_READY or 1 not in versions:
            news = await anext(watch)
            versions[news.status.version] = news.status.state
        assert versions[1] == models_pb2.MODEL_STATE_UNAVAILABLE
        plane.catalog.begin_stop()
        with pytest.raises(grpc.aio.AioRpcError, match="the server is stopping"):
            _ = [each async for each in watch]


def test_the_name_of_each_service_is_known_to_health() -> None:
    modules = (inference_pb2, models_pb2, metrics_pb2, sessions_pb2, grpc_service_pb2)
    services = [each for module in modules for each in module.DESCRIPTOR.services_by_name.values()]
    assert {"", *(each.full_name for each in services)} == set(SERVER_NAMES)


async def test_health_follows_the_catalog(repository: Any, open_plane: Any, tmp_path: Path) -> None:
    repository.write("m")
    repository.write("other")
    async with (
        open_plane(load_models=("m",), **EXPLICIT) as plane,
        serving(plane, tmp_path) as stubs,
    ):
        await plane.until(plane.catalog.all_ready)
        for service in ("", "m", "thirdrail.v1.Inference", "inference.GRPCInferenceService"):
            assert await stubs.check(service) == SERVING
        assert await stubs.check("other") == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stubs.check("nobody")
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND

        watches = {
            service: aiter(stubs.health.Watch(health_pb2.HealthCheckRequest(service=service)))
            for service in ("", "m", "later")
        }
        first = {service: (await anext(watch)).status for service, watch in watches.items()}
        assert first == {"": SERVING, "m": SERVING, "later": UNKNOWN}
        await plane.kill_worker()
        for service in ("", "m"):
            assert (await anext(watches[service])).status == NOT_SERVING
            assert (await anext(watches[service])).status == SERVING
        repository.write("later")
        await plane.control.load("later")
        while (status := (await anext(watches["later"])).status) != SERVING:
            assert status == NOT_SERVING
        plane.catalog.begin_stop()
        for watch in watches.values():
            assert [each.status async for each in watch] == [NOT_SERVING]
        assert await stubs.check("m") == NOT_SERVING


async def test_metrics_in_three_forms(repository: Any, open_plane: Any, tmp_path: Path) -> None:
    repository.write("m")
    async with open_plane() as plane, serving(plane, tmp_path) as stubs:
        await plane.until(plane.catalog.all_ready)
        snapshot = await stubs.metrics.Snapshot(metrics_pb2.SnapshotRequest())
        assert [(each.name, each.requests_ok) for each in snapshot.models] == [("m", 1)]
        assert [(each.name, each.is_serving) for each in snapshot.workers] == [("cpu", True)]
        assert snapshot.uptime_ns > 0
        text = (await stubs.metrics.Scrape(metrics_pb2.ScrapeRequest())).text
        assert 'thirdrail_requests_total{model="m",outcome="ok",version="1"} 1.0' in text
        assert 'thirdrail_worker_up{worker="cpu"} 1.0' in text
        assert "\nthirdrail_regions 2.0\n" in text
        assert "\nthirdrail_region_bytes 4096.0\n" in text
        await plane.kill_worker()
        snapshot = await stubs.metrics.Snapshot(metrics_pb2.SnapshotRequest())
        assert [(each.name, each.requests_ok) for each in snapshot.models] == [("m", 1)]


async def exchange(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = b""
    with contextlib.suppress(ConnectionError):  # closed on us in the middle
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    return answer


async def test_the_http_endpoint_serves_metrics_and_nothing_else() -> None:
    async def text() -> str:
        return "thirdrail_up 1\n"

    endpoint = MetricsEndpoint(text)
    port = await endpoint.start("127.0.0.1", 0)
    expected = {
        b"GET /metrics HTTP/1.1": b"HTTP/1.1 200 OK",
        b"GET /metrics?x=1 HTTP/1.0": b"HTTP/1.1 200 OK",
        b"HEAD /metrics HTTP/1.1": b"HTTP/1.1 200 OK",
        b"POST /metrics HTTP/1.1": b"HTTP/1.1 405",
        b"GET / HTTP/1.1": b"HTTP/1.1 404",
        b"GET /metrics/x HTTP/1.1": b"HTTP/1.1 404",
        b"nonsense": b"HTTP/1.1 400",
    }
    for request, status in expected.items():
        answer = await exchange(port, request + b"\r\n\r\n")
        assert answer.startswith(status), request[:40]
        has_body = status.endswith(b"OK") and not request.startswith(b"HEAD")
        assert answer.endswith(b"\r\n\r\nthirdrail_up 1\n") == has_body
    too_long = b"GET /metrics HTTP/1.1\r\nX: " + b"y" * (1 << 17)
    assert await exchange(port, too_long) == b""
    await endpoint.stop()


async def test_who_reads_no_metrics_gives_his_place_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_service, "REQUEST_S_MAX", 0.05)

    async def text() -> str:
        return "x" * (16 << 20)  # more than the system keeps for him

    endpoint = MetricsEndpoint(text)
    port = await endpoint.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
    await reader.readexactly(1)
    while endpoint._connections:
        await asyncio.sleep(0.01)
    writer.transport.abort()
    await endpoint.stop()


async def test_a_scrape_that_fails_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def text() -> str:
        raise ZeroDivisionError("secret")

    endpoint = MetricsEndpoint(text)
    port = await endpoint.start("127.0.0.1", 0)
    answer = await exchange(port, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 500")
    assert b"secret" not in answer
    assert "a scrape failed" in caplog.text
    await endpoint.stop()
