# SPDX-License-Identifier: Apache-2.0
"""A memory budget on a real server's CPU worker: who is let in, who leaves, what callers see."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from support.killable import until
from support.models import constant, model, slow, tensor, write
from support.server import RunningServer
from thirdrail import Client
from thirdrail.errors import NotFound, ResourceExhausted

MIB = 1 << 20
WIDTH = 1024  # of a model with 4 MiB of weights
X = np.ones((1, WIDTH), np.float32)
EVICT = ("--over-budget=evict", "--evict-after=0")

StartServer = Callable[..., RunningServer]


def weights(value: float) -> onnx.ModelProto:
    """y = x W for a W of 4 MiB with `value` in its diagonal."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shape = ("n", WIDTH)
    matrix = constant("w", np.eye(WIDTH, dtype=np.float32) * np.float32(value))
    return model([node], [tensor("x", "FP32", shape)], [tensor("y", "FP32", shape)], [matrix])


def blown_up(mib: int) -> onnx.ModelProto:
    """y = x W for a W of ones that is made when the model is loaded: its file is tiny."""
    rows = mib * MIB // 4 // WIDTH
    one = helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["w"], value=one),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    inputs, outputs = [tensor("x", "FP32", ("n", rows))], [tensor("y", "FP32", ("n", WIDTH))]
    return model(nodes, inputs, outputs, [constant("shape", np.array([rows, WIDTH]))])


class Budgeted:
    """A server with explicit control and a budget, and a client of it."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.client = Client(server.url, transport="grpc")
        self.client.wait_ready()

    def value(self, name: str) -> float:
        return float(self.client.infer(name, X)["y"][0, 0])

    def status(self, name: str) -> tuple[str, str]:
        (status,) = [each for each in self.client.models() if each.name == name]
        return status.state, status.reason

    def worker(self) -> Any:
        (worker,) = self.client.snapshot().workers
        return worker

    def ready(self) -> set[str]:
        return {each.name for each in self.client.models(ready_only=True)}


@pytest.fixture
def serve(tmp_path: Path, start_server: StartServer) -> Callable[..., Budgeted]:
    """serve(mib, *arguments): with the models a, b, c of 4 MiB each, none of them loaded."""
    repository = tmp_path / "repository"
    for number, name in enumerate("abc"):
        write(repository, name, weights(number + 1))

    def started(mib: float, *arguments: str) -> Budgeted:
        budget = f"--memory-gib={mib / 1024}"
        server = start_server(repository, "--model-control=explicit", budget, *arguments)
        return Budgeted(server)

    return started


def test_what_does_not_fit_is_refused_with_figures(serve: Callable[..., Budgeted]) -> None:
    server = serve(10)
    for name in "ab":
        server.client.load(name)
    with pytest.raises(ResourceExhausted) as refused:
        server.client.load("c")
    text = (
        r"worker 'cpu' has no room for 'c': it needs 4\.0 MiB \(estimated from its files\), and "
        r"8\.\d MiB of the memory budget of 10\.0 MiB are in use: "
        r"'[ab]' 4\.\d MiB, '[ab]' 4\.\d MiB"
    )
    assert re.search(text, str(refused.value))
    state, reason = server.status("c")
    assert state == "unavailable"
    assert re.fullmatch(text, reason)
    assert (server.value("a"), server.value("b")) == (1, 2)
    assert server.client.health()  # nobody started it with c

    server.client.unload("a")
    server.client.load("c")
    assert server.value("c") == 3
    worker = server.worker()
    assert 8 * MIB <= worker.model_bytes <= worker.model_bytes_max == 10 * MIB
    assert worker.evictions == 0
    (size,) = [each.memory_bytes for each in server.client.snapshot().models if each.name == "c"]
    assert 4 * MIB <= size < 4.5 * MIB


@pytest.mark.slow
def test_a_model_that_is_larger_than_its_file_is_found_out(
    serve: Callable[..., Budgeted], tmp_path: Path
) -> None:
    write(tmp_path / "repository", "large", blown_up(16))
    server = serve(10)
    server.client.load("a")
    with pytest.raises(ResourceExhausted, match=r"it needs 16\.\d MiB \(measured\), more than the"):
        server.client.load("large")
    assert server.worker().model_bytes < 5 * MIB, "what was loaded to be weighed is gone"
    assert server.ready() == {"a"}


@pytest.mark.slow
def test_models_that_are_larger_than_their_files_do_not_slip_in_together(
    serve: Callable[..., Budgeted], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        write(tmp_path / "repository", name, blown_up(8))
    server = serve(12)
    outcomes: list[Any] = []

    def load(name: str) -> None:
        try:
            outcomes.append(server.client.load(name))
        except ResourceExhausted as error:
            outcomes.append(error)

    loads = [threading.Thread(target=load, args=(name,)) for name in ("first", "second")]
    for each in loads:
        each.start()
    for each in loads:
        each.join()
    assert len(server.ready()) == 1
    assert [1] in outcomes
    assert server.worker().model_bytes < 9 * MIB


def test_the_least_recently_used_model_makes_room(serve: Callable[..., Budgeted]) -> None:
    server = serve(10, *EVICT)
    server.client.load("a")
    server.client.load("b")
    time.sleep(0.005)  # uses are told apart by the millisecond
    server.value("a")
    server.client.load("c")
    assert server.ready() == {"a", "c"}
    assert server.status("b") == (
        "unavailable",
        "evicted to make room for 'c'; load it to use it again",
    )
    for transport in ("grpc", "lane"):
        with (
            Client(server.server.url, transport=transport) as client,
            pytest.raises(NotFound, match="'b' has no available versions: evicted to make room fo"),
        ):
            client.infer("b", X)
    assert server.worker().evictions == 1
    assert 'thirdrail_worker_evictions_total{worker="cpu"} 1.0' in server.client.metrics()
    assert "model 'b' was evicted to make room for 'c'" in server.server.log_text()

    server.client.load("b")
    assert server.value("b") == 2
    assert server.ready() == {"b", "c"}
    assert server.client.health()


@pytest.mark.slow
def test_no_model_leaves_that_is_in_use_or_was_a_moment_ago(
    serve: Callable[..., Budgeted], tmp_path: Path
) -> None:
    write(tmp_path / "repository", "slow", slow(WIDTH))
    server = serve(6, *EVICT)

    def refusal_beside_a_run(turns: int) -> str:
        """Of the model a. Empty: it was loaded in place of the slow one."""
        server.client.load("slow")
        inputs = {"x": np.ones(1, np.float32), "turns": np.array(turns)}
        run = server.client.submit("slow", inputs)
        until(lambda: run.done() or any(m.running for m in server.client.snapshot().models))
        try:
            server.client.load("a")
        except ResourceExhausted as refused:
            return str(refused)
        finally:
            run.result(60)
        return ""

    text = refusal_beside_a_run(200)
    if not text:  # the run was over before, on a busy machine
        server.client.unload("a")
        text = refusal_beside_a_run(4000)
    assert re.search(r"'slow' \d\.\d MiB \(busy\)", text)
    server.client.load("a")
    assert server.ready() == {"a"}

    patient = serve(6, "--over-budget=evict", "--evict-after=60")
    patient.client.load("a")
    with pytest.raises(ResourceExhausted, match=r"\(used less than 60 s ago\)"):
        patient.client.load("b")


def test_a_reload_that_does_not_fit_beside_what_serves_is_refused(
    serve: Callable[..., Budgeted], tmp_path: Path
) -> None:
    server = serve(6)
    server.client.load("a")
    write(tmp_path / "repository", "a", weights(7))
    with pytest.raises(ResourceExhausted, match="no room for 'a': it needs 4"):
        server.client.load("a")
    assert server.value("a") == 1
    (warning,) = server.client.describe("a").warnings
    assert warning.startswith("the last reload failed, what was loaded before is serving: worker")


@pytest.mark.slow
def test_a_reload_may_let_go_of_what_serves_first(
    serve: Callable[..., Budgeted], tmp_path: Path
) -> None:
    server = serve(6, "--swap=unload-first")
    server.client.load("a")
    write(tmp_path / "repository", "a", weights(7))
    server.client.load("a")
    assert server.value("a") == 7
    assert server.worker().model_bytes < 5 * MIB

    (tmp_path / "repository" / "a" / "1" / "model.onnx").write_bytes(b"broken" * MIB)
    with pytest.raises(Exception, match="not a readable ONNX file"):
        server.client.load("a")
    state, reason = server.status("a")
    assert state == "unavailable"
    assert "not a readable ONNX file" in reason


def test_a_reload_overlaps_where_both_fit(serve: Callable[..., Budgeted], tmp_path: Path) -> None:
    server = serve(10, "--swap=unload-first")
    server.client.load("a")
    write(tmp_path / "repository", "a", weights(7))
    failures: list[Exception] = []
    answers: set[float] = set()
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            try:
                answers.add(server.value("a"))
            except Exception as error:
                failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    server.client.load("a")
    ends.set()
    asking.join()
    assert server.value("a") == 7
    assert failures == []
    assert answers <= {1, 7}


def test_evicting_without_control_makes_no_sense(tmp_path: Path, start_server: StartServer) -> None:
    with pytest.raises(AssertionError, match="--over-budget evict needs --model-control explicit"):
        start_server(tmp_path, "--over-budget=evict")
