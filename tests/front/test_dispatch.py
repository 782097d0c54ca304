# SPDX-License-Identifier: Apache-2.0
"""What the front makes of a worker's refusal, where the catalog knows better."""

import gc
import weakref
from typing import cast

import pytest

from thirdrail.lane.aio import AsyncLane, Reply
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.control_messages import LoadedModel
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.dispatch import Dispatcher
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig


class RefusingLane:
    """A worker that does not know any model, or does not yet."""

    async def call_bytes(self, body: bytes, *, flow: int) -> Reply:
        status = pb.Status(reason=pb.REASON_NOT_FOUND, message="not known to the worker")
        return Reply(pb.InferResponse(final=True, status=status), [])


@pytest.fixture
def catalog() -> Catalog:
    return Catalog(models_max=4, watchers_max=4)


async def refusal(catalog: Catalog, version: int = 0) -> pb.Status:
    dispatcher = Dispatcher(catalog)
    dispatcher.attach(cast(AsyncLane, RefusingLane()), "cpu")
    request = pb.InferRequest(model_name="m", model_version=version)
    body = request.SerializeToString()
    return (await dispatcher.infer_bytes(body, request, flow=0)).response.status


async def test_a_model_that_became_ready_meanwhile_is_not_unknown(catalog: Catalog) -> None:
    catalog.begin_load("m", [1], "cpu")
    catalog.end_load("m", LoadedModel(ModelConfig(name="m"), {1: None}), "cpu")
    status = await refusal(catalog)
    assert status.reason == pb.REASON_UNAVAILABLE
    assert "came before the model was ready" in status.message


async def test_a_model_that_is_being_loaded_is_not_unknown(catalog: Catalog) -> None:
    catalog.begin_load("m", [1], "cpu")
    status = await refusal(catalog)
    assert status.reason == pb.REASON_UNAVAILABLE
    assert "not at ready state: loading" in status.message


async def test_an_unknown_version_of_a_ready_model_stays_unknown(catalog: Catalog) -> None:
    catalog.begin_load("m", [1], "cpu")
    catalog.end_load("m", LoadedModel(ModelConfig(name="m"), {1: None}), "cpu")
    assert (await refusal(catalog, 7)).reason == pb.REASON_NOT_FOUND


async def test_an_unknown_model_stays_unknown(catalog: Catalog) -> None:
    assert (await refusal(catalog)).reason == pb.REASON_NOT_FOUND


async def test_what_refuses_a_model_is_not_kept(catalog: Catalog) -> None:
    """By a cycle of the error, and frames that have that: they have the request, too."""

    async def refuse() -> "weakref.ref[Dispatcher]":
        dispatcher, request = Dispatcher(catalog), pb.InferRequest(model_name="m")
        dispatcher.attach(cast(AsyncLane, RefusingLane()), "cpu")
        await dispatcher.infer_bytes(request.SerializeToString(), request, flow=0)
        return weakref.ref(dispatcher)

    gc.collect()
    gc.disable()
    try:
        refused = await refuse()
        assert refused() is None
    finally:
        gc.enable()
