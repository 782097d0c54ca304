# SPDX-License-Identifier: Apache-2.0
"""Plans come from the cache, or are built once, whatever happens to those who build."""

import contextlib
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import psutil
import pytest

from support.compilations import (
    BUILD_PHASES,
    GIB,
    Services,
    compile_and_say,
    die_while_building,
    request_for,
)
from support.killable import killable, until
from support.perceptrons import two_layers
from support.small_disk import can_mount, run_on_small_disk
from thirdrail_engines import EngineOptions, ModelFileError
from thirdrail_engines.compiling import CompileServices, compile_plan
from thirdrail_engines.onnxruntime_engine import load_plan
from thirdrail_engines.plan_cache import PlanCache, key_of
from thirdrail_engines.plans import BuildError, BuildFault
from thirdrail_engines.repetitions import once_each


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(folder: Path) -> Iterator[PlanCache]:
    with PlanCache(folder, GIB) as made:
        yield made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    path = tmp_path / "model/model.onnx"
    onnx.save(two_layers(), path)
    return path


def catch_builder(act: Callable[[psutil.Process], None]) -> None:
    """Do that to the process that builds as soon as there is one: it has not yet read what to
    build."""

    def is_caught() -> bool:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # others come and go
                if "child.py" in " ".join(child.cmdline()):
                    act(child)
                    return True
        return False

    until(is_caught)


def leftovers(folder: Path) -> list[Path]:
    """Locks and unfinished work."""
    return [*(folder / "work").iterdir(), *(folder / "locks").iterdir()]


def test_a_plan_is_built_once_and_then_found(cache: PlanCache, folder: Path, model: Path) -> None:
    first, second = Services(cache), Services(cache)
    built, was_hit = compile_plan(request_for(model), first.given)
    found, is_hit = compile_plan(request_for(model), second.given)
    assert (was_hit, is_hit) == (False, True)
    assert (first.phases, second.phases) == (BUILD_PHASES, [])
    assert found.data == built.data
    load_plan(found.data, model, options=EngineOptions()).close()
    assert leftovers(folder) == []


def test_the_manifest_says_what_was_built(cache: PlanCache, model: Path) -> None:
    plan, _ = compile_plan(request_for(model), CompileServices(cache))
    manifest = plan.manifest
    assert manifest.source == str(model)
    assert manifest.build_s > 0
    assert manifest.peak_rss_bytes > 1 << 20
    assert manifest.layers["source"] == {"MatMul": 3, "Relu": 1, "ArgMax": 1}
    assert manifest.layers["plan"]
    assert [(t["name"], t["direction"], t["shape"]) for t in manifest.tensors] == [
        ("x", "input", [-1, 16]),
        ("y", "output", [-1, 8]),
        ("z", "output", [-1, 8]),
        ("most", "output", [-1, 1]),
    ]


def test_another_model_is_another_plan(cache: PlanCache, model: Path) -> None:
    compile_plan(request_for(model), CompileServices(cache))
    onnx.save(two_layers(seed=1), model)
    assert compile_plan(request_for(model), CompileServices(cache))[1] is False


def test_without_a_cache_a_plan_is_built_and_nothing_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    plan, is_hit = compile_plan(request_for(model), CompileServices())
    assert not is_hit
    load_plan(plan.data, model, options=EngineOptions()).close()
    assert list((tmp_path / "tmp").glob("*/*/*")) == []  # but empty folders of this user's builds


@pytest.mark.slow
@pytest.mark.parametrize("what", [".", "work"])
def test_a_cache_that_is_removed_while_it_is_built_in(
    cache: PlanCache, folder: Path, model: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    services = Services(cache, **{"starting the build": lambda: shutil.rmtree(folder / what)})
    plan, is_hit = compile_plan(request_for(model), services.given)
    assert not is_hit
    load_plan(plan.data, model, options=EngineOptions()).close()
    assert "the plan is built without the cache: " in caplog.text
    assert "was removed by others while it was in use" in caplog.text


def test_a_source_that_changes_while_it_is_built(
    cache: PlanCache, folder: Path, model: Path
) -> None:
    request = request_for(model)
    services = Services(cache, optimising=lambda: onnx.save(two_layers(seed=1), model))
    with pytest.raises(BuildError, match=r"model.onnx .* changed while its plan was built") as e:
        compile_plan(request, services.given)
    assert e.value.fault is BuildFault.SOURCE_CHANGED
    assert list((folder / "plans").iterdir()) == []
    assert compile_plan(request, CompileServices(cache))[1] is False


def test_a_source_that_cannot_be_read(cache: PlanCache, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"cannot read .*: no such file or directory"):
        compile_plan(request_for(tmp_path / "none.onnx"), CompileServices(cache))


def test_a_cancelled_build_leaves_nothing(cache: PlanCache, folder: Path, model: Path) -> None:
    services = Services(cache)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(compile_plan, request_for(model), services.given)
        catch_builder(psutil.Process.suspend)  # or it might be done before the cancel is seen
        services.cancelled.set()
        with pytest.raises(BuildError) as caught:
            building.result()
    assert caught.value.fault is BuildFault.CANCELLED
    assert leftovers(folder) == []
    assert list((folder / "plans").iterdir()) == []


def test_a_killed_build_is_an_error_and_the_next_succeeds(
    cache: PlanCache, folder: Path, model: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(compile_plan, request_for(model), Services(cache).given)
        catch_builder(psutil.Process.kill)
        with pytest.raises(BuildError, match="was ended by SIGKILL") as caught:
            building.result()
    assert caught.value.fault is BuildFault.CRASHED
    assert leftovers(folder) == []
    assert compile_plan(request_for(model), CompileServices(cache))[1] is False


def test_a_killed_server_leaves_nothing_that_is_in_the_way(folder: Path, model: Path) -> None:
    with killable(die_while_building, folder, model) as server:
        server.process.join()
        assert server.process.exitcode == -signal.SIGKILL
    assert leftovers(folder) != []
    with PlanCache(folder, GIB) as cache:
        assert compile_plan(request_for(model), CompileServices(cache))[1] is False
    assert leftovers(folder) == []


def test_servers_that_start_together_build_once(folder: Path, model: Path) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(killable(compile_and_say, folder, model)) for _ in range(4)]
        assert [each.hear() for each in servers] == ["ready"] * 4
        for each in servers:
            each.pipe.send("go")
        answers = [each.hear() for each in servers]
    assert sorted(is_hit for is_hit, _ in answers) == [False, True, True, True]
    assert len({digest for _, digest in answers}) == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_plan_is_built_anew_with_a_warning(
    folder: Path, model: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    request = request_for(model)
    file = folder / "plans" / key_of(request).digest / "plan"
    with PlanCache(folder, GIB) as cache:
        expected = bytes(compile_plan(request, CompileServices(cache))[0].data)
    data = bytearray(expected)
    data[len(data) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data if damage == "changed" else data[:-1])
    with PlanCache(folder, GIB) as cache, caplog.at_level(logging.WARNING):
        plan, is_hit = compile_plan(request, CompileServices(cache))
        assert (is_hit, bytes(plan.data)) == (False, expected)
        assert ("is not used" in caplog.text) == (damage != "gone")
        assert compile_plan(request, CompileServices(cache))[1] is True


def test_plans_of_a_cache_that_is_only_read_are_used(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    with PlanCache(folder, GIB) as cache:
        compile_plan(request_for(model), CompileServices(cache))
    with PlanCache(tmp_path / "own", GIB, read_only=[folder]) as cache:
        assert compile_plan(request_for(model), CompileServices(cache))[1] is True
    assert list((tmp_path / "own/plans").iterdir()) == []


def test_a_cache_that_is_too_small_hands_plans_over(
    folder: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with PlanCache(folder, 1000) as cache:
        plan, is_hit = compile_plan(request_for(model), CompileServices(cache))
    assert not is_hit
    load_plan(plan.data, model, options=EngineOptions()).close()
    assert "is not kept" in caplog.text


FULL_DISK = """
    import logging
    import threading
    from pathlib import Path
    from support.compilations import *

    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    with PlanCache(disk / "cache", GIB) as cache:
        plan, is_hit = compile_plan(request_for(Path({path!r})), CompileServices(cache))
    print(is_hit, len(plan.data), list((disk / "cache/plans").iterdir()))
"""


def test_a_full_disk_is_no_obstacle(tmp_path: Path, model: Path) -> None:
    """The plan, with the weights in it, does not fit; it is built elsewhere and not kept."""
    if not can_mount():
        return  # there is no elsewhere: a limit on files holds everywhere
    onnx.save(two_layers(width=8192), model)
    said = run_on_small_disk(tmp_path / "disk", 1 << 20, FULL_DISK.format(path=str(model)))
    warning, result = said.splitlines()
    assert warning.startswith(f"{model}: the plan is built without the cache: ")
    assert result.startswith("False ")
    assert result.endswith(" []")


def test_without_a_place_for_temporary_files_that_is_said(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(**_options: object) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._get_default_tempdir", none)
    with pytest.raises(BuildError, match=r"no folder to build in: .*No usable") as caught:
        compile_plan(request_for(model), CompileServices())
    assert caught.value.fault is BuildFault.OUT_OF_DISK


def test_where_there_may_be_no_cache_is_no_place_to_build(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, bytes_max: int) -> PlanCache:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("thirdrail_engines.compiling.PlanCache", full)
    with pytest.raises(BuildError, match=r"no folder to build in: .*No space left") as caught:
        compile_plan(request_for(model), CompileServices())
    assert caught.value.fault is BuildFault.OUT_OF_DISK


def test_warnings_that_differ_in_a_number_are_told_once() -> None:
    told = ["empty constant.40", "no such thing", "empty constant.42", "empty constant.7"]
    assert once_each(told) == ["empty constant.40 (and 2 more like it)", "no such thing"]
    assert once_each([]) == []
