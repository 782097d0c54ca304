# SPDX-License-Identifier: Apache-2.0
"""ModelStreamInfer over a real server: order, errors in band, backpressure, cancel, ends."""

import asyncio
from typing import Any

import grpc
import pytest

from thirdrail_server.inference import grpc_service_pb2 as kserve

Serve = Any  # the fixture `serve` of conftest.py
Status = grpc.StatusCode


def infer_request(request_id: str, **fields: Any) -> kserve.ModelInferRequest:
    valid: dict[str, Any] = {
        "model_name": "M",
        "id": request_id,
        "inputs": [kserve.ModelInferRequest.InferInputTensor(name="X", datatype="INT8", shape=[1])],
        "raw_input_contents": [b"1"],
    }
    return kserve.ModelInferRequest(**{**valid, **fields})


async def until(condition: Any) -> None:
    """Returns once the condition holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def replies_of(call: Any, count: int) -> list[kserve.ModelStreamInferResponse]:
    return [await call.read() for _ in range(count)]


def test_replies_come_in_the_order_of_the_requests_though_later_ones_end_first(
    serve: Serve,
) -> None:
    async def run() -> None:
        async with serve() as serving:
            gate = serving.dispatcher.gates["slow"] = asyncio.Event()
            call = serving.stub.ModelStreamInfer()
            for request_id, model in (("slow", "M"), ("b", "other"), ("c", "M")):
                await call.write(infer_request(request_id, model_name=model))
            # All have been read and the later two answered before the first one can end.
            await until(lambda: len(serving.dispatcher.results) == 2)
            gate.set()
            replies = await replies_of(call, 3)
            assert [each.infer_response.id for each in replies] == ["slow", "b", "c"]
            assert [each.infer_response.model_name for each in replies] == ["M", "other", "M"]
            finals = [
                each.infer_response.parameters["triton_final_response"].bool_param
                for each in replies
            ]
            assert finals == [True, True, True]

    asyncio.run(run())


def test_a_failed_request_is_answered_in_band_and_the_stream_goes_on(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            call = serving.stub.ModelStreamInfer()
            bad = {"model_version": "x"}
            await call.write(infer_request("fail:INVALID_ARGUMENT"))
            await call.write(infer_request("border", **bad))
            await call.write(infer_request("crash"))
            await call.write(infer_request("good"))
            await call.done_writing()
            failed, border, crashed, good = await replies_of(call, 4)
            assert failed == kserve.ModelStreamInferResponse(
                error_message="[request id: fail:INVALID_ARGUMENT] it was INVALID_ARGUMENT",
                infer_response=kserve.ModelInferResponse(id="fail:INVALID_ARGUMENT"),
            )
            assert border.error_message.startswith("[request id: border] failed to get model ver")
            assert border.infer_response == kserve.ModelInferResponse(id="border")
            assert crashed.error_message == "internal error"
            assert good.error_message == ""
            assert good.infer_response.raw_output_contents == [b"1"]
            assert await call.code() is Status.OK

    asyncio.run(run())


def test_with_the_header_the_first_error_ends_the_stream_with_its_status(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            gates = serving.dispatcher.gates
            gates["before"], gates["after"] = asyncio.Event(), asyncio.Event()
            call = serving.stub.ModelStreamInfer(metadata=(("triton_grpc_error", "true"),))
            for request_id in ("before", "fail:QUEUE_FULL", "after"):
                await call.write(infer_request(request_id))
            await until(lambda: "after" in serving.dispatcher.started)
            gates["before"].set()
            assert (await call.read()).infer_response.id == "before"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is Status.UNAVAILABLE
            assert caught.value.details() == "it was QUEUE_FULL"
            await until(lambda: serving.dispatcher.cancelled == ["after"])

    asyncio.run(run())


def test_the_empty_final_response_may_be_asked_for(serve: Serve) -> None:
    wish = {"triton_enable_empty_final_response": kserve.InferParameter(bool_param=True)}

    async def run() -> None:
        async with serve() as serving:
            call = serving.stub.ModelStreamInfer()
            await call.write(infer_request("a", parameters=wish))
            await call.done_writing()
            (reply,) = await replies_of(call, 1)
            assert reply.infer_response.parameters["triton_final_response"].bool_param
            assert await call.read() is grpc.aio.EOF

    asyncio.run(run())


def test_half_close_finishes_everything_in_flight(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            gate = serving.dispatcher.gates["a"] = asyncio.Event()
            call = serving.stub.ModelStreamInfer()
            await call.write(infer_request("a"))
            await call.write(infer_request("b"))
            await call.done_writing()
            await until(lambda: serving.dispatcher.started == ["a", "b"])
            gate.set()
            replies = await replies_of(call, 2)
            assert [each.infer_response.id for each in replies] == ["a", "b"]
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is Status.OK

    asyncio.run(run())


def test_cancel_cancels_everything_in_flight(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            ids = [f"r{i}" for i in range(5)]
            serving.dispatcher.gates.update({each: asyncio.Event() for each in ids})
            call = serving.stub.ModelStreamInfer()
            for each in ids:
                await call.write(infer_request(each))
            await until(lambda: serving.dispatcher.started == ids)
            call.cancel()
            await until(lambda: sorted(serving.dispatcher.cancelled) == ids)

    asyncio.run(run())


def test_cancel_while_a_reply_waits_to_be_written_frees_the_rest(serve: Serve) -> None:
    """The peer takes no replies, so the server sits in a write when the cancel comes."""
    large = infer_request("large", raw_input_contents=[b"x" * (1 << 20)])

    async def run() -> None:
        async with serve() as serving:
            serving.dispatcher.gates["held"] = asyncio.Event()
            call = serving.stub.ModelStreamInfer()
            for _ in range(8):
                await call.write(large)
            await call.write(infer_request("held"))
            await until(lambda: "held" in serving.dispatcher.started)
            call.cancel()
            await until(lambda: serving.dispatcher.cancelled == ["held"])

    asyncio.run(run())


def test_at_the_bound_the_server_reads_no_further(serve: Serve) -> None:
    bound, sent = 4, 40

    async def run() -> None:
        async with serve(stream_requests_in_flight_max=bound) as serving:
            gate = serving.dispatcher.gates["first"] = asyncio.Event()
            call = serving.stub.ModelStreamInfer()
            ids = ["first", *(f"r{i}" for i in range(sent - 1))]
            for each in ids[:bound]:
                await call.write(infer_request(each))
            await until(lambda: len(serving.dispatcher.started) == bound)
            for each in ids[bound:]:
                await call.write(infer_request(each))
            # Another call that has been through since shows that the server had its chance to read.
            for _ in range(20):
                await serving.stub.ServerLive(kserve.ServerLiveRequest())
            assert len(serving.dispatcher.started) == bound
            gate.set()
            replies = await replies_of(call, sent)
            assert [each.infer_response.id for each in replies] == ids

    asyncio.run(run())


def test_a_peer_that_takes_no_replies_is_held_at_the_bound(serve: Serve) -> None:
    """Every request is answered at once; the replies, which nobody reads, count as in flight."""
    bound = 3
    large = infer_request("large", raw_input_contents=[b"x" * (1 << 20)])

    async def run() -> None:
        async with serve(stream_requests_in_flight_max=bound) as serving:
            call = serving.stub.ModelStreamInfer()

            async def send() -> None:
                for _ in range(100):
                    await call.write(large)

            sender = asyncio.create_task(send())
            await until(lambda: len(serving.dispatcher.started) >= bound)
            seen = -1
            while seen != len(serving.dispatcher.started):  # until it stands still
                seen = len(serving.dispatcher.started)
                for _ in range(200):
                    await serving.stub.ServerLive(kserve.ServerLiveRequest())
            assert seen < 20  # the bound, and what fits into the transport's own buffers
            assert not sender.done()
            call.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    asyncio.run(run())


def test_a_stop_answers_what_was_read_and_says_why_the_stream_ends(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            gate = serving.dispatcher.gates["a"] = asyncio.Event()
            idle = serving.stub.ModelStreamInfer()
            await idle.write(infer_request("x"))
            assert (await idle.read()).infer_response.id == "x"
            busy = serving.stub.ModelStreamInfer()
            await busy.write(infer_request("a"))
            await until(lambda: "a" in serving.dispatcher.started)
            serving.servicer.begin_stop()
            gate.set()
            assert (await busy.read()).infer_response.id == "a"
            for call in (busy, idle):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is Status.UNAVAILABLE
                assert caught.value.details() == (
                    "GRPC server is shutting down and has stopped accepting new requests."
                )

    asyncio.run(run())


def test_a_stop_does_not_spoil_a_stream_that_was_half_closed(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            gate = serving.dispatcher.gates["a"] = asyncio.Event()
            call = serving.stub.ModelStreamInfer()
            await call.write(infer_request("a"))
            await call.write(infer_request("b"))
            await call.done_writing()
            await until(lambda: len(serving.dispatcher.results) == 1)
            # One more turn of the connection: the end of the requests has arrived as well.
            await serving.stub.ServerReady(kserve.ServerReadyRequest())
            serving.servicer.begin_stop()
            gate.set()
            replies = await replies_of(call, 2)
            assert [each.infer_response.id for each in replies] == ["a", "b"]
            assert await call.code() is Status.OK

    asyncio.run(run())


def test_each_stream_and_connection_is_a_flow_of_its_own(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            for _ in range(2):
                call = serving.stub.ModelStreamInfer()
                await call.write(infer_request("s1"))
                await call.write(infer_request("s2"))
                await call.done_writing()
                await replies_of(call, 2)
            await serving.stub.ModelInfer(infer_request("u1"))
            await serving.stub.ModelInfer(infer_request("u2"))
            first, same, second, also, unary, again = serving.dispatcher.flows
            assert first == same
            assert second == also
            assert unary == again
            assert len({first, second, unary}) == 3

    asyncio.run(run())
