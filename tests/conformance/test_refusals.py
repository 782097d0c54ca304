# SPDX-License-Identifier: Apache-2.0
"""Requests that do not fit their model get one text by every way in, and nobody else notices."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from support.callers import Answer, Ask, Caller, Failure, Outcome, WireTensor, infer, tensors
from thirdrail.dtypes import encode_bytes, object_array
from thirdrail.statuses import REASONS
from thirdrail.v1 import inference_pb2 as pb

ROW = np.zeros((1, 4), np.float32)
TWO_ROWS = np.zeros((2, 4), np.float32)
A, B = WireTensor.of("a", ROW), WireTensor.of("b", ROW)


def strings(count: int, raw: bytes) -> WireTensor:
    """So many BYTES elements, as the shape says."""
    return WireTensor("x", "BYTES", (count,), raw)


def floats(*shape: int, raw: bytes = b"", name: str = "a") -> WireTensor:
    return WireTensor(name, "FP32", shape, raw)


@dataclass(frozen=True, slots=True)
class Refusal:
    ask: Ask
    text: str
    reason: pb.Reason.ValueType = pb.REASON_INVALID_ARGUMENT


NAMES = {
    "too-few": Refusal(
        Ask("add", [A]),
        "expected 2 inputs but got 1 inputs for model 'add'. Got input(s) ['a'], but missing "
        "required input(s) ['b']. Please provide all required input(s).",
    ),
    "none": Refusal(
        Ask("add", []),
        "expected 2 inputs but got 0 inputs for model 'add'. Got input(s) [], but missing "
        "required input(s) ['a','b']. Please provide all required input(s).",
    ),
    "too-many": Refusal(
        Ask("add", [A, B, replace(A, name="z")]),
        "expected 2 inputs but got 3 inputs for model 'add'. Got input(s) ['a','b','z'].",
    ),
    "optional": Refusal(
        Ask("optional", [WireTensor.of("d", np.zeros(1, np.float32))]),
        "expected number of inputs between 1 and 2 but got 1 inputs for model 'optional'. Got "
        "input(s) ['d'], but missing required input(s) ['x']. Please provide all required "
        "input(s).",
    ),
    "unknown": Refusal(
        Ask("optional", [floats(1, raw=b"1234", name="x"), floats(1, raw=b"1234", name="z")]),
        "unexpected inference input 'z' for model 'optional'",
    ),
    "twice": Refusal(Ask("plus_one", [A, A]), "input 'a' already exists in request"),
    "output": Refusal(
        Ask("plus_one", [A], outputs=["d"]),
        "unexpected inference output 'd' for model 'plus_one'",
    ),
    "output-twice": Refusal(
        Ask("plus_one", [A], outputs=["c", "c"]), "output 'c' already exists in request"
    ),
    "many": Refusal(
        Ask("add", [replace(A, name=f"i{n}") for n in range(65)]),
        "a request takes at most 64 inputs, got 65",
    ),
}

SHAPES = {
    "data-type": Refusal(
        Ask("plus_one", [WireTensor("a", "INT32", (1, 4), bytes(16))]),
        "inference input 'a' data-type is 'INT32', but model 'plus_one' expects 'FP32'",
    ),
    "dimension": Refusal(
        Ask("plus_one", [floats(1, 8, raw=bytes(32))]),
        "unexpected shape for input 'a' for model 'plus_one'. Expected [-1,4], got [1,8].",
    ),
    "rank": Refusal(
        Ask("plus_one", [floats(4, raw=bytes(16))]),
        "unexpected shape for input 'a' for model 'plus_one'. Expected [-1,4], got [4].",
    ),
    "scalar": Refusal(
        Ask("plus_one", [floats(raw=bytes(4))]),
        "unexpected shape for input 'a' for model 'plus_one'. Expected [-1,4], got [].",
    ),
    "rows-differ": Refusal(
        Ask("add", [A, WireTensor.of("b", TWO_ROWS)]),
        "input 'b' batch size does not match other inputs for 'add'",
    ),
    "rows-many": Refusal(
        Ask("add", tensors(a=np.zeros((9, 4), np.float32), b=np.zeros((9, 4), np.float32))),
        "inference request batch-size must be <= 8 for 'add', got 9",
    ),
    "rows-none": Refusal(
        Ask("add", tensors(a=ROW[:0], b=ROW[:0])),
        "inference request batch-size must be >= 1 for 'add', got 0",
    ),
    "negative": Refusal(
        Ask("identity_fp32", [floats(-1, name="x")]),
        "tensor 'x' has a negative dimension in its shape [-1]",
    ),
    "negative-twice": Refusal(
        Ask("plus_one", [floats(-1, -4, raw=bytes(16))]),
        "tensor 'a' has a negative dimension in its shape [-1, -4]",
    ),
    "huge": Refusal(
        Ask("plus_one", [floats(1 << 62, 4)]),
        f"tensor 'a' has the shape [{1 << 62}, 4], more than {1 << 48} elements",
    ),
    "wraps-to-16-bytes": Refusal(
        Ask("plus_one", [floats((1 << 62) + 1, 4, raw=bytes(16))]),
        f"tensor 'a' has the shape [{(1 << 62) + 1}, 4], more than {1 << 48} elements",
    ),
    "deep": Refusal(
        Ask("identity_fp32", [floats(*[1] * 17, raw=bytes(4), name="x")]),
        "tensor 'x' has 17 dimensions, expected at most 16",
    ),
}

SIZES = {
    "long": Refusal(
        Ask("plus_one", [floats(1, 4, raw=bytes(32))]),
        "input byte size mismatch for input 'a' for model 'plus_one'. Expected 16, got 32",
    ),
    "short": Refusal(
        Ask("plus_one", [floats(1, 4, raw=bytes(15))]),
        "input byte size mismatch for input 'a' for model 'plus_one'. Expected 16, got 15",
    ),
    "none": Refusal(
        Ask("plus_one", [floats(1, 4)]),
        "input byte size mismatch for input 'a' for model 'plus_one'. Expected 16, got 0",
    ),
    "far-too-long": Refusal(
        Ask("plus_one", [floats(1, 4, raw=bytes(100_000))]),
        "input byte size mismatch for input 'a' for model 'plus_one'. Expected 16, got 100000",
    ),
    "empty-with-bytes": Refusal(
        Ask("identity_fp32", [floats(0, raw=bytes(4), name="x")]),
        "input byte size mismatch for input 'x' for model 'identity_fp32'. Expected 0, got 4",
    ),
    "strings-few": Refusal(
        Ask("identity_bytes", [strings(2, encode_bytes([b"a"]))]),
        "expected 2 string elements for inference input 'x' for model 'identity_bytes', got 1",
    ),
    "strings-many": Refusal(
        Ask("identity_bytes", [strings(1, encode_bytes([b"a", b"b"]))]),
        "unexpected number of string elements 2 for inference input 'x' for model "
        "'identity_bytes', expecting 1",
    ),
    "length-cut": Refusal(
        Ask("identity_bytes", [strings(2, encode_bytes([b"a"]) + b"\1\0")]),
        "incomplete string length indicator for inference input 'x' for model 'identity_bytes', "
        "expecting 4 bytes but only 2 bytes available",
    ),
    "string-cut": Refusal(
        Ask("identity_bytes", [strings(1, b"\5\0\0\0abc")]),
        "incomplete string data for inference input 'x' for model 'identity_bytes', expecting "
        "string of length 5 but only 3 bytes available",
    ),
    "length-lies": Refusal(
        Ask("identity_bytes", [strings(1, b"\xff\xff\xff\xffabc")]),
        "incomplete string data for inference input 'x' for model 'identity_bytes', expecting "
        "string of length 4294967295 but only 3 bytes available",
    ),
    "not-text": Refusal(
        Ask("identity_bytes", tensors(x=object_array([b"a", b"\xff"], [2]))),
        "input 'x' has an element that is not UTF-8, and this model takes text",
    ),
    "classes-of-strings": Refusal(
        Ask("identity_bytes", tensors(x=object_array([b"a"], [1])), outputs=["y"], classes=1),
        "class result not available for output due to unsupported type 'BYTES'",
    ),
}

MODELS = {
    "unknown": Refusal(
        Ask("none", [A]), "Request for unknown model: 'none' is not found", pb.REASON_NOT_FOUND
    ),
    "nameless": Refusal(
        Ask("", [A]), "Request for unknown model: '' is not found", pb.REASON_NOT_FOUND
    ),
    "climbing": Refusal(
        Ask("../add", [A]),
        "Request for unknown model: '../add' is not found",
        pb.REASON_NOT_FOUND,
    ),
    "version": Refusal(
        Ask("versions", [A], version=2),
        "Request for unknown model: 'versions' version 2 is not found",
        pb.REASON_NOT_FOUND,
    ),
    "version-huge": Refusal(
        Ask("versions", [A], version=(1 << 63) - 1),
        f"Request for unknown model: 'versions' version {(1 << 63) - 1} is not found",
        pb.REASON_NOT_FOUND,
    ),
}

RUNS = {
    "index": Refusal(
        Ask("gather", tensors(index=np.array([9]))),
        "indices element out of data bounds, idx=9 must be within the inclusive range [-4,3]",
        pb.REASON_INVALID_ARGUMENT,
    ),
}

REFUSALS = {
    f"{table}-{name}": refusal
    for table, rows in {
        "names": NAMES,
        "shapes": SHAPES,
        "sizes": SIZES,
        "models": MODELS,
        "runs": RUNS,
    }.items()
    for name, refusal in rows.items()
}


def assert_failed(
    caller: Caller, outcome: Outcome, reason: pb.Reason.ValueType, text: str, request_id: str = ""
) -> None:
    """The text as it is, or as the end of a longer one; reason and status as the protocol has them.
    KServe says which request it is about."""
    assert isinstance(outcome, Failure), outcome
    assert outcome.text.endswith(text)
    is_named = caller.is_kserve and reason == pb.REASON_INVALID_ARGUMENT and request_id
    if is_named:
        assert outcome.text.startswith(f"[request id: {request_id}] ")
    assert outcome.reason in (reason, None)
    row = REASONS[reason]
    status = row.kserve_status if caller.is_kserve else row.status
    assert outcome.status in (status, None)
    assert outcome.request_id in (request_id, None)


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_what_is_wrong_is_said(caller: Caller, refusal: Refusal) -> None:
    assert_failed(caller, caller.submit(refusal.ask).result(), refusal.reason, refusal.text)
    assert_still_serves(caller)


def assert_still_serves(caller: Caller) -> None:
    answer = infer(caller, "plus_one", [A])
    assert isinstance(answer, Answer)
    np.testing.assert_array_equal(answer.outputs["c"], ROW + 1)


def test_a_refusal_names_its_request(caller: Caller) -> None:
    refused = caller.submit(replace(SIZES["short"].ask, request_id="r-7")).result()
    assert_failed(caller, refused, pb.REASON_INVALID_ARGUMENT, SIZES["short"].text, "r-7")


@pytest.mark.parametrize("length", [1025, 65_000, 65_480, 1 << 20])
def test_a_request_id_is_bounded(caller: Caller, length: int) -> None:
    """It travels back with the answer, beside which there must be room for it."""
    outcome = infer(caller, "plus_one", [A], request_id="x" * length)
    assert isinstance(outcome, Failure)
    assert outcome.reason in (pb.REASON_INVALID_ARGUMENT, pb.REASON_RESOURCE_EXHAUSTED, None)
    assert_still_serves(caller)


def test_a_failing_run_hurts_none_of_its_batch_mates(caller: Caller) -> None:
    """Four rows fill a batch; one of them has an index that the table has not."""
    before = caller.counters("picks")
    indices = [2, 9, 0, 3]
    calls = [caller.submit(Ask("picks", tensors(index=np.array([[i]])))) for i in indices]
    outcomes = [call.result() for call in calls]
    assert caller.counters("picks").batches - before.batches <= 1, "they did not share a batch"
    assert_failed(caller, outcomes.pop(1), pb.REASON_INVALID_ARGUMENT, RUNS["index"].text)
    for index, outcome in zip([2, 0, 3], outcomes, strict=True):
        assert isinstance(outcome, Answer), outcome
        np.testing.assert_array_equal(outcome.outputs["y"], [[10 + index]])


def test_a_batch_mate_with_a_bad_request_is_not_in_the_batch(caller: Caller) -> None:
    good = [caller.submit(Ask("add", tensors(a=ROW, b=ROW + 1))) for _ in range(4)]
    bad = caller.submit(SHAPES["rows-differ"].ask)
    for call in good:
        answer = call.result()
        assert isinstance(answer, Answer)
        np.testing.assert_array_equal(answer.outputs["c"], ROW + 1)
    assert isinstance(bad.result(), Failure)
