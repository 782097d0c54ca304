# SPDX-License-Identifier: Apache-2.0
"""Headers of plans, with the first bytes of real ones that TensorRT for RTX built."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thirdrail_engines.plans import Builder
from thirdrail_engines.tensorrt import PlanHeader, describe_plan, read_header

# The first 36 bytes of plans of Magika 1.0.3. By 1.7.1.116 for sm86 and sm120, and by 1.4.0.76.
BY_1_7 = bytes.fromhex(
    "7674727400000000 0200000000000000 8421470000000000 01070174 76747274 14000000"
)
BY_1_4 = bytes.fromhex(
    "7674727400000000 0200000000000000 bcd1460000000000 0104004c 76747274 04000000"
)
# Made up, from the places that trtexec reads: no plan of TensorRT itself was at hand.
BY_TENSORRT = b"ftrt" + bytes(20) + bytes([10, 13, 2, 6]) + bytes(8)


def test_plans_of_tensorrt_for_rtx() -> None:
    assert read_header(BY_1_7) == PlanHeader(
        Builder.TENSORRT_RTX, "1.7.1.116", ("sm86", "sm120"), 4661636
    )
    assert read_header(memoryview(BY_1_4 + b"more")) == PlanHeader(
        Builder.TENSORRT_RTX, "1.4.0.76", ("sm86",), 4641212
    )


def test_plans_of_tensorrt() -> None:
    assert read_header(BY_TENSORRT) == PlanHeader(Builder.TENSORRT, "10.13.2.6")


def test_capabilities_that_came_later() -> None:
    header = read_header(BY_1_7[:32] + (1 << 6 | 1).to_bytes(4, "little"))
    assert header is not None
    assert header.capabilities == ("sm75", "others")


@pytest.mark.parametrize("length", [0, 4, 35])
def test_too_short(length: int) -> None:
    assert read_header(BY_1_7[:length]) is None


@given(st.binary(max_size=100))
def test_any_bytes_have_a_description(data: bytes) -> None:
    for start in (b"", b"vtrt", b"ftrt"):
        text = describe_plan(start + data)
        assert "here: " in text
        assert text.isprintable()


def test_a_plan_that_cannot_load() -> None:
    plan = BY_1_4 + bytes(4641212 - len(BY_1_4))
    text = describe_plan(plan, gpu="NVIDIA L4 (sm89)")
    assert text.startswith("built with TensorRT for RTX 1.4.0.76 for sm86; here: ")
    assert ", NVIDIA L4 (sm89); it needs " in text


def test_a_truncated_plan() -> None:
    assert describe_plan(BY_1_7).endswith("; damaged: 36 bytes of 4661636")


def test_no_plan() -> None:
    assert describe_plan(b"PK\x03\x04").startswith("no TensorRT plan by its first bytes; here: ")
