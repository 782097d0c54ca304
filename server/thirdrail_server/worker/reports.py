# SPDX-License-Identifier: Apache-2.0
"""What a load says about its engine -> what the server tells about it."""

from thirdrail.v1 import models_pb2 as pb
from thirdrail_engines import EngineReport
from thirdrail_engines.output_figures import OutputFigures
from thirdrail_engines.plans import Precision
from thirdrail_server.control_messages import VersionEngine

NS_PER_S = 1e9


def version_engine(report: EngineReport, *, is_stopgap: bool) -> VersionEngine:
    """In the words of the wire."""
    proof = report.proof
    message = pb.EngineReport(
        plan_key=report.plan_key,
        is_cache_hit=report.is_cache_hit,
        build_ns=round(report.build_s * NS_PER_S),
        precision="" if report.precision is Precision.AS_IS else report.precision.value,
        proofs=map(_output_proof, proof.outputs if proof else ()),
        proof_reference=proof.reference.value if proof else "",
    )
    return VersionEngine(report.engine, report.why_not_first, message, is_stopgap)


def _output_proof(figures: OutputFigures) -> pb.OutputProof:
    return pb.OutputProof(
        output=figures.name,
        max_abs_error=figures.max_abs,
        mean_abs_error=figures.mean_abs,
        cosine=figures.cosine,
        max_rel_error=figures.max_rel,
        mean_rel_error=figures.mean_rel,
        equal=figures.equal,
        not_finite=figures.not_finite,
        compared=figures.compared,
    )
