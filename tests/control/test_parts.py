# SPDX-License-Identifier: Apache-2.0
"""A model in several workers: what is told of it, as its parts come and go."""

import pytest

from thirdrail.errors import Unavailable
from thirdrail_server.control_messages import LoadedModel, VersionEngine
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.control.served_model import ServedModel
from thirdrail_server.front.control.turns import Turns
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig

A, B = "cuda:GPU-a", "cuda:GPU-b"


@pytest.fixture
def catalog() -> Catalog:
    catalog = Catalog(models_max=10, watchers_max=2)
    for worker in (A, B):
        catalog.expect_worker(worker)
        catalog.worker_started(worker)
    catalog.expect(["m"])
    return catalog


def serve(
    catalog: Catalog, worker: str, *versions: int, engine: str = "e", reason: str = ""
) -> None:
    ready: dict[int, str | None] = dict.fromkeys(versions)
    engines = {version: VersionEngine(engine, reason) for version in versions}
    catalog.begin_load("m", versions, worker)
    loaded = LoadedModel(ModelConfig(name="m"), ready, {}, ["w"], engines)
    catalog.end_load("m", loaded, worker, instances=2)


def model(catalog: Catalog) -> ServedModel:
    found = catalog.get("m")
    assert found is not None
    return found


def test_a_model_serves_where_one_of_its_parts_does(catalog: Catalog) -> None:
    serve(catalog, B, 1, engine="tensorrt")
    catalog.begin_load("m", [1], A)
    assert (model(catalog).ready_versions, model(catalog).workers_of(0)) == ((1,), (B,))
    assert not catalog.is_settled()
    serve(catalog, A, 1, engine="onnxruntime", reason="refused")
    whole = model(catalog)
    assert (whole.worker, whole.workers_of(1), whole.instances) == (f"{A}, {B}", (A, B), 4)
    assert whole.engines[1].name == "onnxruntime, tensorrt"
    assert (whole.engine_reason(1), whole.warnings) == ("refused", ("w",))
    assert catalog.is_settled()


def test_the_newest_version_is_where_it_is(catalog: Catalog) -> None:
    serve(catalog, A, 1, 2)
    serve(catalog, B, 1)
    whole = model(catalog)
    assert catalog.find("m")[1] == 2
    assert (whole.workers_of(0), whole.workers_of(1)) == ((A,), (A, B))


def test_a_part_that_fails_is_a_warning(catalog: Catalog) -> None:
    serve(catalog, A, 1)
    catalog.begin_load("m", [1], B)
    catalog.fail_load("m", "no room", B)
    assert catalog.find("m")[0].warnings == ("w", f"not served by worker '{B}': no room")
    catalog.fail_load("m", "the folder is gone", "")
    assert len(model(catalog).warnings) == 3
    assert catalog.is_ready("m")


def test_a_worker_that_dies_takes_its_part(catalog: Catalog) -> None:
    serve(catalog, A, 1)
    serve(catalog, B, 1)
    catalog.worker_died(A, ["m"])
    assert (model(catalog).workers_of(0), catalog.all_ready()) == ((B,), True)
    catalog.worker_died(B, ["m"])
    with pytest.raises(Unavailable, match="died; restarting"):
        catalog.find("m")
    assert not catalog.all_ready()
    catalog.worker_started(A)
    serve(catalog, A, 1)
    assert catalog.all_ready()


def test_a_server_whose_workers_have_not_all_started_is_not_ready() -> None:
    catalog = Catalog(models_max=10, watchers_max=2)
    for worker in (A, B):
        catalog.expect_worker(worker)
    catalog.expect([])
    catalog.worker_started(A)
    assert not catalog.all_ready()
    catalog.worker_started(B)
    assert catalog.all_ready()


def test_a_model_that_moves_leaves_nothing_behind(catalog: Catalog) -> None:
    serve(catalog, A, 1)
    catalog.place("m", [B])
    serve(catalog, B, 1)
    assert model(catalog).workers_of(0) == (A, B)  # the old part serves until it is unloaded
    catalog.leave("m", A)
    assert (model(catalog).worker, model(catalog).warnings) == (B, ("w",))
    catalog.end_unload("m")
    catalog.place("m", [A])
    assert model(catalog).versions[0].reason == "unloaded"
    serve(catalog, A, 1)
    assert (model(catalog).worker, model(catalog).parts) == (A, ())


async def test_what_the_server_owes_itself_has_its_place_in_any_line() -> None:
    turns = Turns(waiting_max=0)
    async with turns.of("m"):
        line = turns.of("m", is_callers=False)
        entering = line.__aenter__()
        assert entering.send(None) is not None  # it waits
        entering.close()
