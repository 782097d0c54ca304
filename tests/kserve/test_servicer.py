# SPDX-License-Identifier: Apache-2.0
"""Each unary call over a real server and generated stubs: replies, statuses and texts."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from thirdrail.errors import Internal, PermissionDenied, Unavailable
from thirdrail.v1 import metrics_pb2
from thirdrail_server.inference import grpc_service_pb2 as kserve

Serve = Any  # the fixture `serve` of conftest.py
Serving = Any  # what it gives
Status = grpc.StatusCode
Parameter = kserve.ModelRepositoryParameter


def infer_request(**fields: Any) -> kserve.ModelInferRequest:
    valid: dict[str, Any] = {
        "model_name": "M",
        "inputs": [
            kserve.ModelInferRequest.InferInputTensor(name="X", datatype="FP32", shape=[1, 2])
        ],
        "raw_input_contents": [b"12345678"],
    }
    return kserve.ModelInferRequest(**{**valid, **fields})


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


# Inference


def test_infer_gives_the_outputs_raw_and_the_id_back(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            reply = await serving.stub.ModelInfer(infer_request(id="r-1", model_version="3"))
            assert (reply.id, reply.model_name, reply.model_version) == ("r-1", "M", "3")
            assert reply.raw_output_contents == [b"12345678"]
            assert [result.releases for result in serving.dispatcher.results] == [1]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("INVALID_ARGUMENT", Status.INVALID_ARGUMENT),
        ("NOT_FOUND", Status.NOT_FOUND),
        ("QUEUE_FULL", Status.UNAVAILABLE),
        ("RESOURCE_EXHAUSTED", Status.UNAVAILABLE),
        ("TIMED_OUT", Status.UNAVAILABLE),
        ("UNAVAILABLE", Status.UNAVAILABLE),
        ("CANCELLED", Status.CANCELLED),
        ("UNIMPLEMENTED", Status.UNIMPLEMENTED),
        ("INTERNAL", Status.INTERNAL),
    ],
)
def test_a_failed_request_has_kserves_status(
    serve: Serve, reason: str, status: grpc.StatusCode
) -> None:
    async def run() -> None:
        async with serve() as serving:
            request_id = f"fail:{reason}"
            code, text = await failure(serving.stub.ModelInfer(infer_request(id=request_id)))
            prefix = f"[request id: {request_id}] " if reason == "INVALID_ARGUMENT" else ""
            assert (code, text) == (status, f"{prefix}it was {reason}")
            assert [result.releases for result in serving.dispatcher.results] == [1]

    asyncio.run(run())


def test_a_request_refused_at_the_border_names_itself_and_goes_nowhere(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            request = infer_request(id="r-2", raw_input_contents=[])
            assert await failure(serving.stub.ModelInfer(request)) == (
                Status.INVALID_ARGUMENT,
                "[request id: r-2] unable to find data for input tensor 'X' for model 'M' in "
                "request.",
            )
            assert serving.dispatcher.started == []

    asyncio.run(run())


def test_our_own_bug_is_logged_and_does_not_leak(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with serve() as serving:
            code, text = await failure(serving.stub.ModelInfer(infer_request(id="crash")))
            assert (code, text) == (Status.INTERNAL, "internal error")

    asyncio.run(run())
    (record,) = [r for r in caplog.records if r.name.startswith("thirdrail_server")]
    assert record.levelno == logging.ERROR
    assert "secret" in caplog.text


def test_a_bug_in_another_call_is_logged_and_does_not_leak(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with serve() as serving:
            serving.control.failure = RuntimeError("secret")
            call = serving.stub.RepositoryModelLoad(kserve.RepositoryModelLoadRequest())
            assert await failure(call) == (Status.INTERNAL, "internal error")

    asyncio.run(run())
    assert "secret" in caplog.text


def test_a_long_and_strange_name_still_comes_back_with_its_status(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            request = infer_request(model_name="ü\n" * 20_000, raw_input_contents=[])
            code, text = await failure(serving.stub.ModelInfer(request))
            assert code is Status.INVALID_ARGUMENT
            assert text.startswith("unable to find data for input tensor 'X' for model 'ü\nü")

    asyncio.run(run())


def test_the_deadline_reaches_the_dispatcher_and_its_end_cancels_the_request(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            serving.dispatcher.gates["slow"] = asyncio.Event()
            call = serving.stub.ModelInfer(infer_request(id="slow"), timeout=0.2)
            code, _ = await failure(call)
            assert code is Status.DEADLINE_EXCEEDED
            while serving.dispatcher.cancelled != ["slow"]:
                await asyncio.sleep(0.01)
            # gRPC rounds a timeout up on its way; without one this would be 0.
            assert 0 < serving.dispatcher.requests[0].timeout_us < 1_000_000

    asyncio.run(run())


def test_cancelling_a_call_cancels_its_request_alone(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            gates = serving.dispatcher.gates
            gates["a"], gates["b"] = asyncio.Event(), asyncio.Event()
            cancelled = serving.stub.ModelInfer(infer_request(id="a"))
            other = serving.stub.ModelInfer(infer_request(id="b"))
            while sorted(serving.dispatcher.started) != ["a", "b"]:
                await asyncio.sleep(0.01)
            cancelled.cancel()
            while serving.dispatcher.cancelled != ["a"]:
                await asyncio.sleep(0.01)
            gates["b"].set()
            assert (await other).id == "b"

    asyncio.run(run())


# Health


def test_the_server_is_live_and_ready(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            assert (await serving.stub.ServerLive(kserve.ServerLiveRequest())).live
            assert (await serving.stub.ServerReady(kserve.ServerReadyRequest())).ready

    asyncio.run(run())


@pytest.mark.parametrize(("strict", "ready"), [(True, False), (False, True)])
def test_a_startup_model_that_failed_keeps_a_strict_server_from_being_ready(
    serve: Serve, strict: bool, ready: bool
) -> None:
    async def run() -> None:
        async with serve(strict_readiness=strict) as serving:
            serving.catalog.expect(["M", "missing"])
            reply = await serving.stub.ServerReady(kserve.ServerReadyRequest())
            assert reply.ready is ready

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [
        ("M", "", True),
        ("M", "1", True),
        ("M", "2", False),
        ("M", "9", False),
        ("off", "", False),
        ("unknown", "", False),
    ],
)
def test_model_ready_answers_for_any_name(
    serve: Serve, name: str, version: str, ready: bool
) -> None:
    async def run() -> None:
        async with serve() as serving:
            request = kserve.ModelReadyRequest(name=name, version=version)
            assert (await serving.stub.ModelReady(request)).ready is ready

    asyncio.run(run())


def test_while_stopping_the_server_is_not_ready_and_takes_no_requests(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            gate = serving.dispatcher.gates["early"] = asyncio.Event()
            early = serving.stub.ModelInfer(infer_request(id="early"))
            while not serving.dispatcher.started:
                await asyncio.sleep(0.01)
            serving.servicer.begin_stop()
            assert not (await serving.stub.ServerReady(kserve.ServerReadyRequest())).ready
            assert await failure(serving.stub.ServerLive(kserve.ServerLiveRequest())) == (
                Status.UNAVAILABLE,
                "Server exiting",
            )
            assert await failure(serving.stub.ModelInfer(infer_request())) == (
                Status.UNAVAILABLE,
                "GRPC server is shutting down and has stopped accepting new requests.",
            )
            gate.set()
            assert (await early).id == "early"

    asyncio.run(run())


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
        (Unavailable("explicit model load / unload is not allowed"), Status.UNAVAILABLE),
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
