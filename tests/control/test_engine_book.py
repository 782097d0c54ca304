# SPDX-License-Identifier: Apache-2.0
"""What is counted of loads and their engines."""

from thirdrail.v1 import models_pb2 as pb
from thirdrail.v1.metrics_pb2 import SnapshotResponse
from thirdrail_server.control_messages import VersionEngine
from thirdrail_server.front.control.engine_book import EngineBook
from thirdrail_server.front.control.metrics_text import prometheus_text

PROOF = pb.OutputProof(output="y", max_abs_error=0.5, cosine=0.75, compared=1)
BUILT = VersionEngine(
    "a", report=pb.EngineReport(plan_key="k", build_ns=3, proofs=[PROOF], proof_reference="torch")
)
FOUND = VersionEngine("a", report=pb.EngineReport(plan_key="k", build_ns=3, is_cache_hit=True))
PLAIN = VersionEngine("b")
FALLEN = VersionEngine("b", "a: missing")
STOPGAP = VersionEngine("b", "a: compiling", is_stopgap=True)


def test_loads_are_counted_by_what_came_of_them() -> None:
    book = EngineBook()
    for engine in (STOPGAP, BUILT, FOUND, FOUND, FALLEN, PLAIN):
        book.loaded("m", {1: engine})
    [counters] = book.counters()
    assert (counters.name, counters.version) == ("m", 1)
    assert (counters.cache_hits, counters.cache_misses, counters.build_ns) == (2, 1, 3)
    assert counters.fallbacks == 1
    assert not counters.proofs


def test_proofs_are_those_of_the_present_engine() -> None:
    book = EngineBook()
    book.loaded("m", {2: BUILT, 1: PLAIN})
    first, second = book.counters()
    assert (first.version, list(first.proofs)) == (1, [])
    assert list(second.proofs) == [PROOF]
    text = prometheus_text(SnapshotResponse(engines=book.counters()))
    labels = '{model="m",output="y",reference="torch",version="2"}'
    assert f"thirdrail_proof_max_abs_error{labels} 0.5" in text
    assert f"thirdrail_proof_cosine{labels} 0.75" in text
    assert 'thirdrail_plan_build_seconds_total{model="m",version="2"} 3e-09' in text
