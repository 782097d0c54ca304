# SPDX-License-Identifier: Apache-2.0
"""A proof is made once for each plan, device, driver and runtime, and judged each time."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.plan_caches import key, put
from thirdrail_engines.expectations import Reference
from thirdrail_engines.output_figures import OutputFigures
from thirdrail_engines.plan_cache import Plan, PlanCache
from thirdrail_engines.plans import Profile
from thirdrail_engines.profiles import read_shape_range
from thirdrail_engines.proof_records import RunsOn, recorded_proof
from thirdrail_engines.reference_proof import ReferenceProof, Tolerance
from thirdrail_engines.trials import ValueRange

HERE = RunsOn(device="GPU-1", driver="13.0", runtime="tensorrt_rtx 1.7", reference="onnxruntime 1")
PROFILES = (Profile({"x": read_shape_range("1,2,3")}),)
LOOSE, STRICT = Tolerance(max_abs=1.0), Tolerance(max_abs=0.1)
FIGURES = (OutputFigures("y", max_abs=0.5, compared=3),)


class Prover:
    """Proves by saying so, and counts."""

    def __init__(self, failed: str = "") -> None:
        self.count = 0
        self._failed = failed

    def __call__(self) -> ReferenceProof:
        self.count += 1
        return ReferenceProof(FIGURES, ("profile 0 best",), failed=self._failed)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[PlanCache]:
    with PlanCache(tmp_path / "cache", 1 << 30) as made:
        yield made


@pytest.fixture
def plan(cache: PlanCache) -> Plan:
    return put(cache, key("one"), b"a plan")


def test_a_proof_is_made_once_and_judged_each_time(cache: PlanCache, plan: Plan) -> None:
    prover = Prover()
    first = recorded_proof(plan, HERE, PROFILES, {}, LOOSE, cache, prover)
    again = recorded_proof(plan, HERE, PROFILES, {}, LOOSE, cache, prover)
    strict = recorded_proof(plan, HERE, PROFILES, {}, STRICT, cache, prover)
    assert prover.count == 1
    assert first == again
    assert (first.is_proven, strict.is_proven) == (True, False)
    assert strict.faults == ("output 'y' has max_abs 0.5, allowed is 0.1",)


def test_an_older_record_is_of_the_reference_that_there_was() -> None:
    proof = ReferenceProof(FIGURES, ("profile 0 best",), reference=Reference.TORCH)
    assert ReferenceProof.from_dict(proof.to_dict()) == proof
    older = {key: value for key, value in proof.to_dict().items() if key != "reference"}
    assert ReferenceProof.from_dict(older).reference is Reference.ONNXRUNTIME
    with pytest.raises(ValueError, match="'a friend'"):
        ReferenceProof.from_dict({**older, "reference": "a friend"})


@pytest.mark.parametrize("changed", ["device", "driver", "runtime", "reference"])
def test_what_changes_on_the_host_asks_for_another_proof(
    cache: PlanCache, plan: Plan, changed: str
) -> None:
    prover = Prover()
    there = dataclasses.replace(HERE, **{changed: "another"})
    for runs_on in (HERE, there, HERE, there):
        recorded_proof(plan, runs_on, PROFILES, {}, LOOSE, cache, prover)
    assert prover.count == 2


def test_other_shapes_and_other_bytes_ask_for_another_proof(cache: PlanCache, plan: Plan) -> None:
    prover = Prover()
    recorded_proof(plan, HERE, PROFILES, {}, LOOSE, cache, prover)
    recorded_proof(plan, HERE, (), {}, LOOSE, cache, prover)
    cache.release(plan.key)
    rebuilt = put(cache, key("one"), b"built again, and not the same")
    recorded_proof(rebuilt, HERE, PROFILES, {}, LOOSE, cache, prover)
    assert prover.count == 3
    recorded_proof(rebuilt, HERE, PROFILES, {"x": ValueRange(0, 7)}, LOOSE, cache, prover)
    assert prover.count == 4


def test_a_run_that_failed_is_tried_again(cache: PlanCache, plan: Plan) -> None:
    prover = Prover(failed="out of device memory")
    for _ in range(2):
        proof = recorded_proof(plan, HERE, PROFILES, {}, LOOSE, cache, prover)
        assert proof.faults[0] == "out of device memory"
    assert prover.count == 2


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b'{"outputs": [{}]}', b"\xff"])
def test_a_record_that_makes_no_sense_is_made_anew(
    cache: PlanCache, plan: Plan, monkeypatch: pytest.MonkeyPatch, record: bytes
) -> None:
    prover = Prover()
    monkeypatch.setattr(cache, "notes", lambda plan, name: record)
    assert recorded_proof(plan, HERE, PROFILES, {}, LOOSE, cache, prover).is_proven
    assert prover.count == 1


def test_the_record_is_readable_and_without_a_cache_there_is_none(
    cache: PlanCache, plan: Plan, tmp_path: Path
) -> None:
    recorded_proof(plan, HERE, PROFILES, {}, LOOSE, cache, Prover())
    (file,) = (tmp_path / "cache/notes" / plan.key.digest).iterdir()
    assert file.name.startswith("proof-")
    text = file.read_bytes()
    record = json.loads(text[text.index(b"{\n") :])
    assert record["outputs"][0]["max_abs"] == 0.5
    prover = Prover()
    for _ in range(2):
        recorded_proof(plan, HERE, PROFILES, {}, LOOSE, None, prover)
    assert prover.count == 2


@pytest.mark.parametrize(
    "figure",
    ['"max_abs": NaN', '"max_abs": "0.1"', '"cosine": Infinity', '"equal": null', '"name": 1'],
)
def test_figures_that_are_none_prove_nothing(
    cache: PlanCache, plan: Plan, tmp_path: Path, figure: str
) -> None:
    prover = Prover()
    recorded_proof(plan, HERE, PROFILES, {}, LOOSE, cache, prover)
    [name] = [path.name for path in (tmp_path / "cache" / "notes" / plan.key.digest).iterdir()]
    record = json.dumps(prover().to_dict() | {"outputs": "OUTPUTS"})
    cache.note(plan, name, record.replace('"OUTPUTS"', f'[{{"name": "y", {figure}}}]').encode())
    assert recorded_proof(plan, HERE, PROFILES, {}, LOOSE, cache, prover).outputs == FIGURES


@pytest.mark.parametrize("record", [b"[]", b"[" * 100_000, b'{"outputs": [[]]}'])
def test_what_is_no_record_proves_nothing(
    cache: PlanCache, plan: Plan, tmp_path: Path, record: bytes
) -> None:
    prover = Prover()
    recorded_proof(plan, HERE, PROFILES, {}, LOOSE, cache, prover)
    [name] = [path.name for path in (tmp_path / "cache" / "notes" / plan.key.digest).iterdir()]
    cache.note(plan, name, record)
    assert recorded_proof(plan, HERE, PROFILES, {}, LOOSE, cache, prover).outputs == FIGURES


@pytest.mark.parametrize(
    ("figures", "tolerance"),
    [
        (OutputFigures("y", compared=1, max_abs=float("nan")), Tolerance(max_abs=0.5)),
        (OutputFigures("y", compared=1, cosine=float("nan")), Tolerance(cosine=0.5)),
    ],
)
def test_a_nan_is_within_no_bound(figures: OutputFigures, tolerance: Tolerance) -> None:
    assert not ReferenceProof((figures,), ("run",)).judged(tolerance).is_proven
