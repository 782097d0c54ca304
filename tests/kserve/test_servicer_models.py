# SPDX-License-Identifier: Apache-2.0
"""The calls beside inference, over a real server: descriptions, repository, settings."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from thirdrail.errors import Internal, PermissionDenied, Unavailable
from thirdrail.v1 import metrics_pb2
from thirdrail_server.front.control.access import ControlIsOff
from thirdrail_server.inference import grpc_service_pb2 as kserve

Serve = Any  # the fixture `serve` of conftest.py
Serving = Any  # what it gives
Status = grpc.StatusCode
Parameter = kserve.ModelRepositoryParameter


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


# Metadata, configuration, statistics


def test_the_servers_name_is_a_setting(serve: Serve) -> None:
    async def run() -> None:
        async with serve(server_name="triton") as serving:
            reply = await serving.stub.ServerMetadata(kserve.ServerMetadataRequest())
            assert reply.name == "triton"

    asyncio.run(run())


@pytest.mark.parametrize(("version", "versions"), [("", ["1", "3"]), ("1", ["1"])])
def test_metadata_and_configuration_agree(serve: Serve, version: str, versions: list[str]) -> None:
    async def run() -> None:
        async with serve() as serving:
            metadata = await serving.stub.ModelMetadata(
                kserve.ModelMetadataRequest(name="M", version=version)
            )
            config = (
                await serving.stub.ModelConfig(kserve.ModelConfigRequest(name="M", version=version))
            ).config
            assert (metadata.name, metadata.versions) == (config.name, versions)
            assert [each.name for each in metadata.inputs] == [each.name for each in config.input]
            assert list(metadata.inputs[0].shape) == [-1, *config.input[0].dims]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "version", "status", "part"),
    [
        ("none", "", Status.NOT_FOUND, "Request for unknown model: 'none' is not found"),
        ("M", "9", Status.NOT_FOUND, "'M' version 9 is not found"),
        ("off", "", Status.NOT_FOUND, "'off' has no available versions"),
        ("M", "2", Status.UNAVAILABLE, "'M' version 2 is not at ready state"),
        ("M", "x", Status.INVALID_ARGUMENT, "version should be an integral value > 0"),
    ],
)
def test_models_that_cannot_be_described(
    serve: Serve, name: str, version: str, status: grpc.StatusCode, part: str
) -> None:
    async def run() -> None:
        async with serve() as serving:
            for call in (
                serving.stub.ModelMetadata(kserve.ModelMetadataRequest(name=name, version=version)),
                serving.stub.ModelConfig(kserve.ModelConfigRequest(name=name, version=version)),
            ):
                code, text = await failure(call)
                assert code is status
                assert part in text

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "version", "found"),
    [
        ("", "", [("M", "1"), ("M", "3")]),
        ("M", "", [("M", "1"), ("M", "3")]),
        ("M", "3", [("M", "3")]),
    ],
)
def test_statistics_are_those_of_ready_versions(
    serve: Serve, name: str, version: str, found: list[tuple[str, str]]
) -> None:
    async def run() -> None:
        async with serve() as serving:
            serving.control.figures = [
                metrics_pb2.ModelCounters(name="M", version=3, rows=5),
                metrics_pb2.ModelCounters(name="off", version=1, rows=7),
            ]
            reply = await serving.stub.ModelStatistics(
                kserve.ModelStatisticsRequest(name=name, version=version)
            )
            assert [(each.name, each.version) for each in reply.model_stats] == found
            assert reply.model_stats[-1].inference_count == 5

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "version", "text"),
    [
        ("none", "", "requested model 'none' is not available"),
        ("off", "", "requested model 'off' is not available"),
        ("M", "2", "requested model 'M' version 2 is not available"),
    ],
)
def test_statistics_of_what_is_not_there(serve: Serve, name: str, version: str, text: str) -> None:
    async def run() -> None:
        async with serve() as serving:
            call = serving.stub.ModelStatistics(
                kserve.ModelStatisticsRequest(name=name, version=version)
            )
            assert await failure(call) == (Status.INVALID_ARGUMENT, text)

    asyncio.run(run())


# Repository


def test_the_index_shows_every_version_and_can_be_filtered(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            index = await serving.stub.RepositoryIndex(kserve.RepositoryIndexRequest())
            assert [(m.name, m.version, m.state, m.reason) for m in index.models] == [
                ("M", "1", "READY", ""),
                ("M", "2", "UNAVAILABLE", "it is broken"),
                ("M", "3", "READY", ""),
                ("off", "1", "UNAVAILABLE", "unloaded"),
            ]
            ready = await serving.stub.RepositoryIndex(kserve.RepositoryIndexRequest(ready=True))
            assert [(m.name, m.version) for m in ready.models] == [("M", "1"), ("M", "3")]

    asyncio.run(run())


def test_load_and_unload_reach_the_control(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            await serving.stub.RepositoryModelLoad(
                kserve.RepositoryModelLoadRequest(
                    model_name="new",
                    parameters={
                        "config": Parameter(string_param='{"max_batch_size": "16"}'),
                        "file:1/model.onnx": Parameter(bytes_param=b"graph"),
                    },
                )
            )
            await serving.stub.RepositoryModelUnload(
                kserve.RepositoryModelUnloadRequest(
                    model_name="M", parameters={"unload_dependents": Parameter(bool_param=True)}
                )
            )
            config = kserve.ModelConfig(name="new", max_batch_size=16)
            assert serving.control.loads == [("new", config, {"1/model.onnx": b"graph"})]
            assert serving.control.unloads == [("M", False)]

    asyncio.run(run())


def control_calls(serving: Serving) -> Iterator[Any]:
    yield serving.stub.RepositoryModelLoad(kserve.RepositoryModelLoadRequest(model_name="M"))
    yield serving.stub.RepositoryModelUnload(kserve.RepositoryModelUnloadRequest(model_name="M"))


def test_callers_without_the_right_control_nothing(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            serving.refusal.append(PermissionDenied("not you"))
            for call in control_calls(serving):
                assert await failure(call) == (Status.PERMISSION_DENIED, "not you")
            assert (serving.control.loads, serving.control.unloads) == ([], [])

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Internal("failed to load 'M', no version is available"), Status.INTERNAL),
        (Unavailable("the worker is being restarted"), Status.UNAVAILABLE),
        (ControlIsOff("explicit model load / unload is not allowed"), Status.UNAVAILABLE),
    ],
)
def test_failures_of_the_control_keep_their_text(
    serve: Serve, error: Exception, status: grpc.StatusCode
) -> None:
    async def run() -> None:
        async with serve() as serving:
            serving.control.failure = error
            for call in control_calls(serving):
                assert await failure(call) == (status, str(error))

    asyncio.run(run())


def test_repository_names_are_not_supported(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            for call in (
                serving.stub.RepositoryIndex(kserve.RepositoryIndexRequest(repository_name="r")),
                serving.stub.RepositoryModelLoad(
                    kserve.RepositoryModelLoadRequest(repository_name="r")
                ),
                serving.stub.RepositoryModelUnload(
                    kserve.RepositoryModelUnloadRequest(repository_name="r")
                ),
            ):
                text = "'repository_name' specification is not supported"
                assert await failure(call) == (Status.UNIMPLEMENTED, text)

    asyncio.run(run())


# Shared memory


def test_shared_memory_is_off(serve: Serve) -> None:
    text = (
        "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to "
        "enable."
    )

    async def run() -> None:
        async with serve() as serving:
            stub = serving.stub
            for call in (
                stub.SystemSharedMemoryRegister(kserve.SystemSharedMemoryRegisterRequest()),
                stub.SystemSharedMemoryUnregister(kserve.SystemSharedMemoryUnregisterRequest()),
                stub.CudaSharedMemoryRegister(kserve.CudaSharedMemoryRegisterRequest()),
                stub.CudaSharedMemoryUnregister(kserve.CudaSharedMemoryUnregisterRequest()),
            ):
                assert await failure(call) == (Status.UNIMPLEMENTED, text)
            system = stub.SystemSharedMemoryStatus(kserve.SystemSharedMemoryStatusRequest())
            assert not (await system).regions
            cuda = stub.CudaSharedMemoryStatus(kserve.CudaSharedMemoryStatusRequest())
            assert not (await cuda).regions
            named = kserve.SystemSharedMemoryStatusRequest(name="N")
            assert await failure(stub.SystemSharedMemoryStatus(named)) == (
                Status.NOT_FOUND,
                "Unable to find system shared memory region: 'N'",
            )
            assert await failure(
                stub.CudaSharedMemoryStatus(kserve.CudaSharedMemoryStatusRequest(name="N"))
            ) == (Status.NOT_FOUND, "Unable to find cuda shared memory region: 'N'")

    asyncio.run(run())


# Settings


def test_trace_settings_are_kept_per_model(serve: Serve) -> None:
    def rate(*value: str) -> dict[str, kserve.TraceSettingRequest.SettingValue]:
        return {"trace_rate": kserve.TraceSettingRequest.SettingValue(value=value)}

    async def run() -> None:
        async with serve() as serving:
            change = kserve.TraceSettingRequest(model_name="M", settings=rate("7"))
            changed = await serving.stub.TraceSetting(change)
            assert changed.settings["trace_rate"].value == ["7"]
            read = await serving.stub.TraceSetting(kserve.TraceSettingRequest())
            assert read.settings["trace_rate"].value == ["1000"]
            of_model = kserve.TraceSettingRequest(model_name="M")
            assert (await serving.stub.TraceSetting(of_model)).settings["trace_rate"].value == ["7"]
            unknown = kserve.TraceSettingRequest(model_name="N", settings=rate("7"))
            assert await failure(serving.stub.TraceSetting(unknown)) == (
                Status.INVALID_ARGUMENT,
                "Request for unknown model : N",
            )

    asyncio.run(run())


def test_the_trace_settings_of_a_model_end_with_it(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            value = kserve.TraceSettingRequest.SettingValue(value=["7"])
            change = kserve.TraceSettingRequest(model_name="off", settings={"trace_rate": value})
            await serving.stub.TraceSetting(change)
            serving.catalog.remove("off")
            await serving.stub.TraceSetting(kserve.TraceSettingRequest())
            serving.catalog.begin_load("off", [1], "cpu")
            reply = await serving.stub.TraceSetting(kserve.TraceSettingRequest(model_name="off"))
            assert reply.settings["trace_rate"].value == ["1000"]

    asyncio.run(run())


@pytest.fixture
def _server_log_level() -> Iterator[None]:
    logger = logging.getLogger("thirdrail_server")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("_server_log_level")
def test_log_settings_change_what_the_server_logs(serve: Serve) -> None:
    logger = logging.getLogger("thirdrail_server")
    logger.setLevel(logging.CRITICAL)

    async def run() -> None:
        async with serve() as serving:
            await serving.stub.LogSettings(kserve.LogSettingsRequest())
            assert logger.level == logging.CRITICAL  # reading changes nothing
            value = kserve.LogSettingsRequest.SettingValue(uint32_param=1)
            request = kserve.LogSettingsRequest(settings={"log_verbose_level": value})
            reply = await serving.stub.LogSettings(request)
            assert reply.settings["log_verbose_level"].uint32_param == 1
            assert logger.level == logging.DEBUG

    asyncio.run(run())


@pytest.mark.usefixtures("_server_log_level")
def test_log_settings_are_changed_by_few_and_read_by_all(serve: Serve) -> None:
    setting = kserve.LogSettingsRequest.SettingValue

    async def run() -> None:
        async with serve() as serving:
            serving.refusal.append(PermissionDenied("not you"))
            change = kserve.LogSettingsRequest(settings={"log_info": setting(bool_param=False)})
            code, text = await failure(serving.stub.LogSettings(change))
            assert (code, text) == (Status.PERMISSION_DENIED, "not you")
            reply = await serving.stub.LogSettings(kserve.LogSettingsRequest())
            assert reply.settings["log_info"].bool_param
            # What nobody may change is no question of who asks.
            file = kserve.LogSettingsRequest(settings={"log_file": setting(string_param="/x")})
            code, _ = await failure(serving.stub.LogSettings(file))
            assert code is Status.UNIMPLEMENTED

    asyncio.run(run())
