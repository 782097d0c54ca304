# SPDX-License-Identifier: Apache-2.0
"""Unary inference and health over a real server and generated stubs: replies and statuses."""

import asyncio
import logging
from typing import Any

import grpc
import pytest

from thirdrail_server.inference import grpc_service_pb2 as kserve

Serve = Any  # the fixture `serve` of conftest.py
Status = grpc.StatusCode


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
            while not serving.dispatcher.started:  # on a busy machine it is over before that
                call = serving.stub.ModelInfer(infer_request(id="slow"), timeout=0.2)
                code, _ = await failure(call)
                assert code is Status.DEADLINE_EXCEEDED
            while serving.dispatcher.cancelled != serving.dispatcher.started:
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
