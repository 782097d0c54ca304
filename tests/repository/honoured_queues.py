# SPDX-License-Identifier: Apache-2.0
"""Checks of honoured fields: batches and queues."""

from pathlib import Path

from repository.honoured import QUEUE_REQUESTS_MAX, honours, options, refusal

BATCHES = "max_batch_size: 8 dynamic_batching { %s }"


@honours("dynamic_batching")
def dynamic_batching(_: Path) -> None:
    assert options(BATCHES % "").queue.rows_max == 8
    assert options("dynamic_batching {}").queue.rows_max == 0  # nothing to batch along


@honours("dynamic_batching.preferred_batch_size")
def preferred_batch_size(_: Path) -> None:
    batches = options(BATCHES % "preferred_batch_size: [8, 4, 4]")
    assert batches.queue.preferred_rows == (4, 8)
    assert refusal(BATCHES % "preferred_batch_size: 9") == (
        "dynamic_batching: preferred_batch_size is (9,), "
        "expected sizes from 1 to max_batch_size, which is 8"
    )
    assert "preferred_batch_size" in refusal(BATCHES % "preferred_batch_size: 0")


@honours("dynamic_batching.max_queue_delay_microseconds")
def max_queue_delay(_: Path) -> None:
    delayed = options(BATCHES % "max_queue_delay_microseconds: 500")
    assert delayed.queue.delay_us_max == 500
    text = refusal(BATCHES % "max_queue_delay_microseconds: 18446744073709551615")
    assert "max_queue_delay_microseconds must be at most 86400000000 (a day)" in text


@honours("dynamic_batching.priority_levels")
@honours("dynamic_batching.default_priority_level")
def priorities(_: Path) -> None:
    queue = options(BATCHES % "priority_levels: 3 default_priority_level: 2").queue
    assert (queue.priority_levels, queue.default_priority) == (3, 2)
    assert refusal(BATCHES % "priority_levels: 3") == (
        "dynamic_batching: default_priority_level is 0, expected 1 to priority_levels, which is 3"
    )
    assert "default_priority_level is 1" in refusal(BATCHES % "default_priority_level: 1")
    assert "priority_levels is 9999" in refusal(BATCHES % "priority_levels: 9999")


@honours("dynamic_batching.default_queue_policy.timeout_action")
def timeout_action(_: Path) -> None:
    delays = options(BATCHES % "default_queue_policy { timeout_action: DELAY }")
    assert delays.queue.timeout_action == "delay"
    assert options(BATCHES % "").queue.timeout_action == "reject"


@honours("dynamic_batching.default_queue_policy.default_timeout_microseconds")
def default_timeout(_: Path) -> None:
    policy = "default_queue_policy { default_timeout_microseconds: %d }"
    assert options(BATCHES % (policy % 70)).queue.timeout_us_default == 70
    assert "default_timeout_microseconds" in refusal(BATCHES % (policy % (1 << 63)))


@honours("dynamic_batching.default_queue_policy.allow_timeout_override")
def allow_timeout_override(_: Path) -> None:
    policy = "default_queue_policy { default_timeout_microseconds: 70 %s }"
    assert options(BATCHES % (policy % "")).queue.wait_us(50) == 70
    allowed = options(BATCHES % (policy % "allow_timeout_override: true"))
    assert allowed.queue.wait_us(50) == 50
    assert options("").queue.wait_us(50) == 50  # no limit is configured, so none is overridden


@honours("dynamic_batching.default_queue_policy.max_queue_size")
def max_queue_size(_: Path) -> None:
    bounded = options(BATCHES % "default_queue_policy { max_queue_size: 7 }")
    assert bounded.queue.requests_max == 7
    assert options(BATCHES % "").queue.requests_max == QUEUE_REQUESTS_MAX
    assert options("").queue.requests_max == QUEUE_REQUESTS_MAX


@honours("dynamic_batching.priority_queue_policy.timeout_action")
@honours("dynamic_batching.priority_queue_policy.default_timeout_microseconds")
@honours("dynamic_batching.priority_queue_policy.allow_timeout_override")
@honours("dynamic_batching.priority_queue_policy.max_queue_size")
def priority_queue_policy(_: Path) -> None:
    text = """priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: %d value {
        timeout_action: DELAY default_timeout_microseconds: 9 allow_timeout_override: true
        max_queue_size: 5 } }"""
    queue = options(BATCHES % (text % 2)).queue
    second = queue.of(2)
    assert (second.timeout_action, second.timeout_us_default) == ("delay", 9)
    assert (second.wait_us(4), second.requests_max) == (4, 5)
    assert queue.of(1).requests_max == QUEUE_REQUESTS_MAX
    assert "priority_queue_policy is [3]" in refusal(BATCHES % (text % 3))
