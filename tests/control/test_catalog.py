# SPDX-License-Identifier: Apache-2.0
"""The catalog: which version a request gets, with the texts that foreign clients compare."""

import asyncio

import pytest

from thirdrail.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable
from thirdrail.models import error_of_missing, status_of_message
from thirdrail_server.control_messages import LoadedModel, VersionEngine
from thirdrail_server.front.control.catalog import RELOAD_FAILED, Catalog
from thirdrail_server.front.control.models_service import statuses_of
from thirdrail_server.front.control.served_model import (
    LOADING,
    READY,
    UNAVAILABLE,
    UNLOADING,
    VersionStatus,
)
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig


def loaded(**versions: str | None) -> LoadedModel:
    """loaded(v1=None, v2="why it failed")"""
    numbers = {int(name[1:]): failure for name, failure in versions.items()}
    return LoadedModel(
        ModelConfig(name="m"), numbers, {1: ["x"]}, ["w"], {2: VersionEngine("onnxruntime")}
    )


@pytest.fixture
def catalog() -> Catalog:
    return Catalog(models_max=10, watchers_max=2)


def serve(catalog: Catalog, name: str = "m", **versions: str | None) -> None:
    catalog.begin_load(name, [int(each[1:]) for each in versions], "cpu")
    catalog.end_load(name, loaded(**versions), "cpu")


def states(catalog: Catalog, name: str = "m") -> dict[int, int]:
    model = catalog.get(name)
    assert model is not None
    return {each.version: each.state for each in model.versions}


def test_no_version_means_the_newest_ready_one(catalog: Catalog) -> None:
    serve(catalog, v2=None, v10=None, v11="damaged")
    assert catalog.find("m", "")[1] == 10
    assert catalog.find("m", 0)[1] == 10
    model, version = catalog.find("m", "2")
    assert (version, model.config, model.engines[2].name) == (
        2,
        ModelConfig(name="m"),
        "onnxruntime",
    )
    assert model.in_place == {1: ("x",)}


@pytest.mark.parametrize(
    "version", ["x", "0", "-1", "1.0", "+1", " 1", "\u0661", "9" * 19, "9" * 99, -1]
)
def test_a_bad_version_is_refused(catalog: Catalog, version: str | int) -> None:
    serve(catalog, v1=None)
    with pytest.raises(InvalidArgument, match="failed to get model version from specified version"):
        catalog.find("m", version)
    with pytest.raises(InvalidArgument, match="version should be an integral value > 0"):
        catalog.is_ready("m", version)


def test_what_is_not_there_is_not_found(catalog: Catalog) -> None:
    with pytest.raises(NotFound, match=r"^Request for unknown model: 'm' is not found$"):
        catalog.find("m", "")
    serve(catalog, v1=None)
    with pytest.raises(NotFound, match="'m' version 7 is not found"):
        catalog.find("m", "7")
    catalog.begin_unload("m")
    assert states(catalog) == {1: UNLOADING}
    catalog.end_unload("m")
    with pytest.raises(NotFound, match="'m' has no available versions"):
        catalog.find("m", "")
    with pytest.raises(Unavailable, match="'m' version 1 is not at ready state: unloaded"):
        catalog.find("m", "1")
    assert not catalog.is_ready("m")
    assert not catalog.is_ready("other", 3)


def test_a_model_being_loaded_is_unavailable_not_unknown(catalog: Catalog) -> None:
    catalog.begin_load("m", [1], "cpu")
    with pytest.raises(Unavailable, match="is not at ready state"):
        catalog.find("m", "")


def test_a_failed_first_load_says_why_and_is_not_found(catalog: Catalog) -> None:
    catalog.begin_load("m", [3], "cpu")
    catalog.fail_load("m", "the file is damaged")
    model = catalog.get("m")
    assert model is not None
    assert model.versions == (VersionStatus(3, UNAVAILABLE, "the file is damaged"),)
    with pytest.raises(NotFound, match="has no available versions"):
        catalog.find("m")


def test_a_reload_leaves_the_old_version_ready_until_the_swap(catalog: Catalog) -> None:
    serve(catalog, v1=None)
    catalog.begin_load("m", [1, 2], "cpu")
    assert states(catalog) == {1: READY, 2: LOADING}
    catalog.end_load("m", loaded(v2=None), "cpu")
    assert states(catalog) == {2: READY}


def test_a_failed_reload_leaves_the_old_one_and_warns_once(catalog: Catalog) -> None:
    serve(catalog, v1=None)
    for reason in ("damaged", "still damaged"):
        catalog.begin_load("m", [2], "cpu")
        catalog.fail_load("m", reason)
    model, version = catalog.find("m")
    assert version == 1
    told = f"{RELOAD_FAILED}: still damaged"
    assert model.warnings == ("w", told)
    assert [each.reason for each in model.versions] == [told]
    serve(catalog, v2=None)
    model, _ = catalog.find("m")
    assert model.warnings == ("w",)
    assert [each.reason for each in model.versions] == [""]


def test_a_failed_reload_ends_what_was_to_improve_the_model(catalog: Catalog) -> None:
    """The build of the better engine gave way to the load that failed."""
    waits = VersionEngine("onnxruntime", "plan: compiling: it is built", is_stopgap=True)
    ended = "plan: not built: the load that was to build it failed"
    catalog.begin_load("m", [1], "cpu")
    catalog.end_load("m", LoadedModel(ModelConfig(), {1: None}, {}, [], {1: waits}), "cpu")
    catalog.fail_load("m", "the file is damaged")
    model = catalog.get("m")
    assert model is not None
    assert model.engines == {1: VersionEngine("onnxruntime", ended)}


def test_a_dead_worker_takes_its_own_models_only(catalog: Catalog) -> None:
    serve(catalog, v1=None)
    serve(catalog, "broken", v1=None)
    catalog.begin_load("elsewhere", [1], "cuda:0")
    catalog.end_load("elsewhere", loaded(v1=None), "cuda:0")
    catalog.worker_died("cpu", ["m"])
    with pytest.raises(Unavailable, match="worker 'cpu' died; restarting"):
        catalog.find("m")
    with pytest.raises(Unavailable, match="worker 'cpu' died; restarting"):
        catalog.find("m", "1")
    with pytest.raises(NotFound, match="has no available versions"):
        catalog.find("broken")
    assert catalog.is_ready("elsewhere")
    serve(catalog, v1=None)
    assert catalog.is_ready("m")


def test_callers_are_told_which_models_come_back(catalog: Catalog) -> None:
    """On the lane the client asks, for the worker knows nothing of its predecessor's models."""
    serve(catalog, v1=None)
    serve(catalog, "broken", v1=None)
    catalog.worker_died("cpu", ["m"])
    for name, expected in (("m", Unavailable), ("broken", NotFound)):
        model = catalog.get(name)
        assert model is not None
        (status,) = statuses_of(model)
        assert type(error_of_missing(status_of_message(status))) is expected


def test_readiness_is_every_startup_model_and_every_worker(catalog: Catalog) -> None:
    catalog.expect_worker("cpu")
    assert not catalog.all_ready()
    catalog.expect(["a", "b"])
    catalog.worker_started("cpu")
    serve(catalog, "a", v1=None)
    assert not catalog.all_ready()
    serve(catalog, "b", v1=None)
    assert catalog.all_ready()
    catalog.begin_load("late", [1], "cpu")
    catalog.fail_load("late", "damaged")
    assert catalog.all_ready()
    catalog.worker_died("cpu", ["a", "b"])
    assert not catalog.all_ready()
    serve(catalog, "a", v1=None)
    serve(catalog, "b", v1=None)
    assert not catalog.all_ready()
    catalog.worker_started("cpu")
    assert catalog.all_ready()
    catalog.begin_stop()
    assert not catalog.all_ready()


def test_a_model_unloaded_on_purpose_counts_no_more(catalog: Catalog) -> None:
    catalog.expect(["a", "b"])
    serve(catalog, "a", v1=None)
    catalog.fail_load("b", "damaged")
    assert not catalog.all_ready()
    catalog.end_unload("b")
    assert catalog.all_ready()


def test_an_empty_repository_is_ready(catalog: Catalog) -> None:
    catalog.expect([])
    assert catalog.all_ready()


def test_models_and_watchers_are_bounded(catalog: Catalog) -> None:
    for number in range(10):
        catalog.list_not_loaded(f"m{number}", [1])
    with pytest.raises(ResourceExhausted):
        catalog.begin_load("one more", [1], "cpu")
    serve(catalog, "m0", v1=None)
    with catalog.subscribe(), catalog.subscribe(), pytest.raises(ResourceExhausted):
        catalog.subscribe()
    with catalog.subscribe():
        pass


async def test_a_subscriber_learns_of_each_changed_model_once_however_slow_it_is(
    catalog: Catalog,
) -> None:
    with catalog.subscribe() as changes:
        for _ in range(100):
            serve(catalog, "a", v1=None)
            serve(catalog, "b", v1=None)
        assert [await anext(changes), await anext(changes)] == ["a", "b"]
        waiting = asyncio.create_task(anext(changes))
        await asyncio.sleep(0)
        assert not waiting.done()
        catalog.remove("b")
        assert await waiting == "b"
        catalog.begin_stop()
        assert [name async for name in changes] == [""]
