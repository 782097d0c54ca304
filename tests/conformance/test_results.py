# SPDX-License-Identifier: Apache-2.0
"""Requests that succeed give the same result by every way in."""

import numpy as np
import pytest

from support.callers import Answer, Ask, Caller, WireTensor, infer, tensors
from support.kserve_callers import CONTENTS
from support.models import array
from thirdrail.dtypes import BY_NAME, object_array
from thirdrail.tensors import Array, bytes_of_array

INTEGERS = [name for name in BY_NAME if "INT" in name]
FLOATS = ["FP16", "BF16", "FP32", "FP64"]


def samples(dtype: str) -> Array:
    """Ordinary values and the extreme ones."""
    numpy = BY_NAME[dtype].numpy
    if dtype == "BYTES":
        return object_array([b"", b"a\0b", "grün".encode(), b"\0", b"", b"x" * 300], [6])
    if dtype == "BOOL":
        return np.array([True, False, True])
    if dtype in INTEGERS:
        limits = np.iinfo(numpy)
        return np.array([limits.min, 0, 1, limits.max], numpy)
    return np.array([-1.5, 0.0, -0.0, np.inf, -np.inf, np.nan], numpy)


def answered(outcome: object) -> Answer:
    assert isinstance(outcome, Answer), outcome
    return outcome


def assert_same(got: Array, sent: Array) -> None:
    """Bit by bit, so that NaN and -0.0 count."""
    assert (got.shape, got.dtype) == (sent.shape, sent.dtype)
    assert bytes(bytes_of_array(got)) == bytes(bytes_of_array(sent))


@pytest.mark.parametrize("dtype", BY_NAME)
def test_every_type_comes_back_as_it_was_sent(caller: Caller, dtype: str) -> None:
    sent = samples(dtype)
    answer = answered(infer(caller, f"identity_{dtype.lower()}", tensors(x=sent)))
    assert_same(answer.outputs["y"], sent)
    assert not answer.came_as_values


@pytest.mark.parametrize("dtype", BY_NAME)
def test_empty_tensors_of_every_type(caller: Caller, dtype: str) -> None:
    sent = samples(dtype)[:0]
    answer = answered(infer(caller, f"identity_{dtype.lower()}", tensors(x=sent)))
    assert_same(answer.outputs["y"], sent)


@pytest.mark.parametrize("dtype", CONTENTS)
def test_elements_may_be_written_out(caller: Caller, dtype: str) -> None:
    """A native request made of values is answered in values; KServe answers raw always."""
    sent = samples(dtype)
    model = f"identity_{dtype.lower()}"
    answer = answered(infer(caller, model, tensors(x=sent), as_values=True))
    assert_same(answer.outputs["y"], sent)
    assert answer.came_as_values == (not caller.is_kserve)


@pytest.mark.parametrize("dtype", ["FP16", "BF16"])
def test_half_floats_may_be_written_out_natively(caller: Caller, dtype: str) -> None:
    if caller.is_kserve:
        return  # the protocol has no list for them
    model = f"identity_{dtype.lower()}"
    answer = answered(infer(caller, model, tensors(x=samples(dtype)), as_values=True))
    assert_same(answer.outputs["y"], samples(dtype))


def test_a_scalar_has_no_dimensions(caller: Caller) -> None:
    sent = np.array(2.5, np.float32)
    for as_values in (False, True):
        answer = answered(infer(caller, "scalar", tensors(x=sent), as_values=as_values))
        assert_same(answer.outputs["y"], sent)


@pytest.mark.parametrize("elements", [4095, 4096, 4097, 1 << 20])
def test_size_changes_nothing(caller: Caller, elements: int) -> None:
    """16 KiB is where tensors begin to travel in memory; the last one has 4 MiB."""
    sent = np.arange(elements, dtype=np.float32)
    assert_same(answered(infer(caller, "identity_fp32", tensors(x=sent))).outputs["y"], sent)


def test_large_strings(caller: Caller) -> None:
    sent = object_array([b"a" * 70_000, b"", b"b" * 200_000], [3])
    assert_same(answered(infer(caller, "identity_bytes", tensors(x=sent))).outputs["y"], sent)


def test_concurrent_callers_get_their_own_rows(caller: Caller) -> None:
    """64 requests of 1 to 3 rows share batches of 8."""
    rng = np.random.default_rng(7)
    sent = [rng.random((1 + i % 3, 4), np.float32) for i in range(64)]
    calls = [caller.submit(Ask("add", tensors(a=a, b=np.full_like(a, 100)))) for a in sent]
    answers = [answered(call.result()) for call in calls]
    for a, answer in zip(sent, answers, strict=True):
        np.testing.assert_array_equal(answer.outputs["c"], a + 100)
    if not caller.is_kserve:
        assert max(answer.timing.batch_rows for answer in answers if answer.timing) > 3


def test_requests_of_many_models_may_be_in_flight_together(caller: Caller) -> None:
    a = np.ones((1, 4), np.float32)
    asks = [Ask("plus_one", tensors(a=a)), Ask("gather", tensors(index=array([1, 2], "INT64")))]
    asks += [Ask("none", tensors(a=a)), Ask("identity_fp32", tensors(x=a[0]))]
    calls = [caller.submit(ask) for ask in asks * 8]
    outcomes = [call.result() for call in calls]
    for outcome in outcomes[0::4]:
        np.testing.assert_array_equal(answered(outcome).outputs["c"], a + 1)
    for outcome in outcomes[1::4]:
        np.testing.assert_array_equal(answered(outcome).outputs["y"], [11, 12])
    assert not any(isinstance(outcome, Answer) for outcome in outcomes[2::4])
    for outcome in outcomes[3::4]:
        np.testing.assert_array_equal(answered(outcome).outputs["y"], a[0])


A, B = np.array([1, 2], np.float32), np.array([10, 30], np.float32)


def test_outputs_come_in_the_models_order_and_only_those_wanted(caller: Caller) -> None:
    everything = answered(infer(caller, "two", tensors(a=A, b=B)))
    assert list(everything.outputs) == ["sum", "difference"]
    backwards = infer(caller, "two", tensors(a=A, b=B), outputs=["difference", "sum"])
    assert list(answered(backwards).outputs) == ["sum", "difference"]
    one = answered(infer(caller, "two", tensors(a=A, b=B), outputs=["difference"]))
    assert list(one.outputs) == ["difference"]
    np.testing.assert_array_equal(one.outputs["difference"], A - B)


def test_the_order_of_inputs_is_free(caller: Caller) -> None:
    answer = answered(infer(caller, "two", tensors(b=B, a=A)))
    np.testing.assert_array_equal(answer.outputs["difference"], A - B)


def test_an_input_with_a_default_may_be_left_out(caller: Caller) -> None:
    np.testing.assert_array_equal(
        answered(infer(caller, "optional", tensors(x=A))).outputs["y"], A + 5
    )
    given = tensors(x=A, d=np.array([7], np.float32))
    np.testing.assert_array_equal(answered(infer(caller, "optional", given)).outputs["y"], A + 7)


def test_the_newest_version_answers_unless_another_is_named(caller: Caller) -> None:
    a = np.zeros((1, 4), np.float32)
    for version, ran, value in ((0, 3, 3), (3, 3, 3), (1, 1, 1)):
        answer = answered(infer(caller, "versions", tensors(a=a), version=version))
        assert answer.version == ran
        np.testing.assert_array_equal(answer.outputs["c"], a + value)


SCORES = np.array([[0.1, 0.7, 0.2], [3, 1, 3]], np.float32)


def test_classification_names_the_best_classes(caller: Caller) -> None:
    options = {"outputs": ["scores"], "classes": 2}
    answer = answered(infer(caller, "classifier", tensors(x=SCORES), **options))
    assert answer.outputs["scores"].tolist() == [
        [b"0.700000:1:dog", b"0.200000:2:fish"],
        [b"3.000000:0:cat", b"3.000000:2:fish"],
    ]


def test_more_classes_than_there_are_give_all(caller: Caller) -> None:
    options = {"outputs": ["scores"], "classes": 99}
    answer = answered(infer(caller, "classifier", tensors(x=SCORES), **options))
    assert answer.outputs["scores"].shape == (2, 3)


def test_classification_without_batching_has_one_dimension(caller: Caller) -> None:
    options = {"outputs": ["y"], "classes": 1}
    answer = answered(infer(caller, "identity_fp32", tensors(x=SCORES[0]), **options))
    assert answer.outputs["y"].tolist() == [b"0.700000:1"]


def test_the_request_id_comes_back(caller: Caller) -> None:
    for request_id in ("", "7b0c", "ünïcode ", "x" * 1024):
        ask = infer(caller, "identity_fp32", tensors(x=A), request_id=request_id)
        assert answered(ask).request_id == request_id


def test_timing_says_where_the_time_went(caller: Caller) -> None:
    if caller.is_kserve:
        return  # the protocol has no place for it
    timing = answered(infer(caller, "add", tensors(a=SCORES[:, [0, 1, 2, 0]], b=_ROWS))).timing
    assert timing is not None
    assert timing.batch_rows == 2
    assert timing.compute_ns > 0
    assert timing.transport in ("grpc", "lane")


_ROWS = np.zeros((2, 4), np.float32)


def test_results_belong_to_their_receiver(caller: Caller) -> None:
    """A result keeps its values while later requests use the server's memory again."""
    first = np.full(1 << 16, 1, np.float32)
    held = answered(infer(caller, "identity_fp32", tensors(x=first)))
    for value in range(2, 6):
        answered(infer(caller, "identity_fp32", tensors(x=np.full_like(first, value))))
    np.testing.assert_array_equal(held.outputs["y"], first)


def test_any_priority_is_fine_for_a_model_without_priorities(caller: Caller) -> None:
    sent = [WireTensor.of("x", A)]
    assert_same(answered(infer(caller, "identity_fp32", sent, priority=3)).outputs["y"], A)
