# SPDX-License-Identifier: Apache-2.0
"""ONNX's own operator cases through a whole server: those that fail are explained, one and all."""

import contextlib
import locale
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.operator_cases import (
    OPSET_MAX,
    OperatorCase,
    all_cases,
    cases_of,
    run_cases,
    write_cases,
)
from support.server import running_server

STAMP = f"@{OPSET_MAX}"


def has_locale(name: str) -> bool:
    before = locale.setlocale(locale.LC_CTYPE)
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, name)
        locale.setlocale(locale.LC_CTYPE, before)
        return True
    return False


@dataclass(frozen=True, slots=True)
class Reason:
    """Why cases do not pass: what the server, or ONNX Runtime, says about them.

    as_shipped, stamped: how many there are with constraints.txt's onnx and onnxruntime. One more is
    a case that broke, one less is a case that passes and must be counted out.
    """

    text: str
    pattern: str
    as_shipped: int
    stamped: int = 0


REASONS = (
    Reason(
        "the stamp is newer than ONNX Runtime serves (run again with an older one)",
        r"^load: .*(Unsupported model IR version|Opset \d+ is under development)",
        289,
    ),
    Reason(
        "types of 8 bits and less that only ONNX has are not served",
        r"^load: .* is a tensor\((float8|float4|u?int4|u?int2)",
        88,
        62,
    ),
    Reason("sequences are not served", r"^load: .* is a seq\(", 20, 1),
    Reason("optional values are not served", r"^load: .* is a optional\(", 3, 5),
    Reason(
        "ONNX Runtime does not know the operator",
        r"^load: .*(is not a registered function/op|No Op registered for)",
        18,
        30,
    ),
    Reason(
        "ONNX Runtime has no kernel for the operator with these types",
        r"^load: .*(Could not find an implementation for|Failed to find kernel for)",
        41,
        12,
    ),
    Reason(
        "the attribute or type is newer than ONNX Runtime, or than the older stamp",
        r"^load: .*(Unrecognized attribute|Type 'tensor\(\w+\)' of input parameter .* is invalid)",
        11,
        33,
    ),
    Reason(
        "ONNX Runtime expands Attention on BF16 into a graph that mixes types",
        r"^load: .*Optype \(Add\) bound to different types \(tensor\(bfloat16\) and tensor\(float",
        3,
    ),
    Reason(
        "ONNX Runtime does not run recurrent operators batchwise",
        r"^load: .*Batchwise recurrent operations",
        3,
    ),
    Reason(
        "the host has no locale en_US.UTF-8, which StringNormalizer asks for",
        r"^load: .*Failed to construct locale with name:en_US.UTF-8",
        0 if has_locale("en_US.UTF-8") else 4,
    ),
    Reason(
        "ONNX Runtime's kernel refuses the inputs when it runs",
        r"^over gRPC: run: .*(Non per-tensor quantization is not supported"
        r"|ReduceMax is not defined for empty set with bool type"
        r"|inconsistent total_sequence_length"
        r"|fmod attribute must be true for floating point types)",
        3,
        6,
    ),
    Reason(
        "ONNX Runtime itself differs from ONNX's reference by more than the case allows",
        r"^over gRPC: ONNX Runtime's own output '.*': values: .*"
        r"; over the lane: ONNX Runtime's own output '.*': values: ",
        22,
    ),
)

# Many types, optional inputs, no inputs, scalars, empty tensors, text, outputs of unknown size.
FAST = ("add", "clip", "constant", "identity", "nonzero", "not_", "shape", "string_concat", "tile")


def test_a_handful_of_operators(tmp_path: Path) -> None:
    prefixes = tuple(f"test_{name.rstrip('_')}" for name in FAST)
    cases = [case for case in cases_of(*FAST) if case.name.startswith(prefixes)]
    failures = failures_of(cases, tmp_path)
    reasons = reasons_of(failures)
    assert len(cases) > 40
    assert {name: failures[name] for name, reason in reasons.items() if reason is None} == {}
    assert len(reasons) < len(cases) / 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = all_cases()
    failures = failures_of(cases, tmp_path)
    reasons = reasons_of(failures)
    with capsys.disabled():
        print(f"\n{summary([case.name for case in cases], reasons)}")
    assert {name: failures[name] for name, reason in reasons.items() if reason is None} == {}
    found = Counter((reason, name.endswith(STAMP)) for name, reason in reasons.items())
    assert {each.text: (found[each, False], found[each, True]) for each in REASONS} == {
        each.text: (each.as_shipped, each.stamped) for each in REASONS
    }


def failures_of(cases: Sequence[OperatorCase], folder: Path) -> dict[str, str]:
    """Those that failed."""
    repository = folder / "repository"
    write_cases(repository, cases)
    arguments = ("--model-control=explicit", f"--load-model={cases[0].name}")
    with running_server(repository, folder / "server", arguments) as server:
        failures = run_cases(server.url, cases)
        assert "Traceback" not in server.log_text()
    return {name: failure for name, failure in failures.items() if failure}


def reasons_of(failures: Mapping[str, str]) -> dict[str, Reason | None]:
    """None: nothing explains it."""
    return {name: reason_of(failure) for name, failure in failures.items()}


def reason_of(failure: str) -> Reason | None:
    fitting = [reason for reason in REASONS if re.search(reason.pattern, failure)]
    assert len(fitting) < 2, (failure, fitting)
    return fitting[0] if fitting else None


def summary(names: Sequence[str], reasons: Mapping[str, Reason | None]) -> str:
    """The figures of docs/onnx.md."""
    lines = []
    for what, is_stamped in (("as shipped", False), (f"stamped as opset {OPSET_MAX}", True)):
        chosen = [name for name in names if name.endswith(STAMP) == is_stamped]
        failed = [reasons[name] for name in chosen if name in reasons]
        lines.append(f"{what}: {len(chosen) - len(failed)} of {len(chosen)} cases pass")
        for reason, count in Counter(failed).most_common():
            lines.append(f"  {count:4d}  {reason.text if reason else 'UNEXPLAINED'}")
    return "\n".join(lines)
