# SPDX-License-Identifier: Apache-2.0
"""Poll mode: fingerprints tell every change, and nothing is done before a folder held still."""

import os
import shutil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thirdrail_server.repository import fingerprint as fingerprint_module
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.fingerprint import Fingerprint, fingerprint, snapshot
from thirdrail_server.repository.layout import scan
from thirdrail_server.repository.poll import Decision, Poller


def state(number: int) -> Fingerprint:
    return (("1/model.onnx", number, number, 1),)


A, B, C = state(1), state(2), state(3)


def test_a_new_folder_is_loaded_once_it_held_still() -> None:
    poller = Poller({})
    assert poller.observe({"m": A}) == []
    assert poller.observe({"m": B}) == []  # still being written
    assert poller.observe({"m": B}) == [Decision("load", "m")]
    assert poller.observe({"m": B}) == []


def test_a_change_reloads_after_two_equal_polls() -> None:
    poller = Poller({"m": A})
    assert [poller.observe({"m": each}) for each in (A, B, C)] == [[], [], []]
    assert poller.observe({"m": C}) == [Decision("reload", "m")]


def test_a_change_that_is_taken_back_does_nothing() -> None:
    poller = Poller({"m": A})
    assert [poller.observe({"m": each}) for each in (B, A, A, A)] == [[], [], [], []]


def test_a_folder_that_vanished_for_two_polls_is_unloaded() -> None:
    poller = Poller({"m": A})
    assert poller.observe({}) == []
    assert poller.observe({"m": A}) == []  # it was only being swapped
    assert poller.observe({}) == []
    assert poller.observe({}) == [Decision("unload", "m")]
    assert poller.observe({}) == []
    assert poller.observe({"m": A}) == []
    assert poller.observe({"m": A}) == [Decision("load", "m")]


def test_unloads_come_first() -> None:
    poller = Poller({"z": A})
    poller.observe({"a": A})
    assert poller.observe({"a": A}) == [Decision("unload", "z"), Decision("load", "a")]


def test_the_callers_mapping_is_not_changed() -> None:
    running = {"m": A}
    poller = Poller(running)
    poller.observe({})
    poller.observe({})
    assert running == {"m": A}


@given(st.lists(st.dictionaries(st.sampled_from("mn"), st.sampled_from([A, B, C])), max_size=12))
def test_whatever_was_seen_two_still_polls_bring_the_last_state(
    polls: list[dict[str, Fingerprint]],
) -> None:
    poller = Poller({"m": A})
    loaded = {"m": A}
    for before, poll in zip([{"m": A}, *polls], [*polls, polls[-1] if polls else {}], strict=True):
        for decision in poller.observe(poll):
            assert before.get(decision.name) == poll.get(decision.name)
            assert (decision.action == "load") == (decision.name not in loaded)
            if decision.action == "unload":
                del loaded[decision.name]
            else:
                loaded[decision.name] = poll[decision.name]
    final = polls[-1] if polls else {"m": A}
    if polls:
        assert loaded == final
    assert poller.acted_on == loaded


def test_every_change_of_a_folder_changes_its_fingerprint(repository: Any) -> None:
    path = repository.write("m/1/model.onnx", "one")
    os.utime(path, ns=(1, 1))
    states = [fingerprint(repository.model("m"))]

    def changed() -> bool:
        states.append(fingerprint(repository.model("m")))
        return states[-1] not in states[:-1]

    assert not changed()
    repository.write("m/config.pbtxt", "max_batch_size: 1")
    assert changed()
    path.write_text("four")
    assert changed()
    os.utime(path, ns=(2, 2))
    assert changed()
    copy = repository.write("m/1/.copy", "more")
    os.utime(copy, ns=(2, 2))  # same size, same mtime, another file
    copy.replace(path)
    assert changed()
    (repository.root / "m/2").mkdir()
    assert changed()


def test_hidden_files_do_not_count(repository: Any) -> None:
    repository.write("m/1/model.onnx")
    before = fingerprint(repository.model("m"))
    repository.write("m/1/.model.onnx.swp")
    assert fingerprint(repository.model("m")) == before


def test_turning_a_symlink_changes_the_fingerprint(repository: Any) -> None:
    repository.write(".data/a/model.onnx", "a")
    repository.write(".data/b/model.onnx", "b")
    link = repository.root / "m/1"
    link.parent.mkdir()
    link.symlink_to("../.data/a")
    before = fingerprint(repository.model("m"))
    assert "1/model.onnx" in [stamp[0] for stamp in before]
    link.unlink()
    link.symlink_to("../.data/b")
    assert fingerprint(repository.model("m")) != before


def test_loops_of_symlinks_end(repository: Any) -> None:
    repository.write("m/1/model.onnx")
    (repository.root / "m/1/loop").symlink_to(".")
    assert len(fingerprint(repository.model("m"))) < 50


def test_the_number_of_files_is_bounded(repository: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "FILES_MAX", 3)
    for name in "abc":
        repository.write(f"m/1/{name}")
    repository.write("n/1/model.onnx")
    models = scan(repository.root)
    with pytest.raises(RepositoryError, match="model 'm' has more than 3 files"):
        fingerprint(models["m"])
    assert snapshot(models).keys() == {"m", "n"}
    assert snapshot(models)["n"] == fingerprint(models["n"])


def test_a_model_that_is_repaired_is_seen(repository: Any) -> None:
    repository.write("m/README", "")
    poller = Poller(snapshot(scan(repository.root)))
    repository.write("m/1/model.onnx")
    assert poller.observe(snapshot(scan(repository.root))) == []
    assert poller.observe(snapshot(scan(repository.root))) == [Decision("reload", "m")]
    shutil.rmtree(repository.root / "m")
    assert poller.observe(snapshot(scan(repository.root))) == []
    assert poller.observe(snapshot(scan(repository.root))) == [Decision("unload", "m")]
