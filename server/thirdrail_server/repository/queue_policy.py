# SPDX-License-Identifier: Apache-2.0
"""A configuration's scheduling fields -> the QueuePolicy that the worker's queue obeys."""

import re

from thirdrail_server.inference.grpc_service_pb2 import ModelConfig, ModelQueuePolicy
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.worker.policy import LevelPolicy, QueuePolicy, TimeoutAction

WAIT_US_MAX = (
    24 * 3600 * 1_000_000
)  # nothing waits longer than a day; 0 is the way to say "no limit"

# The policy names its own fields when it refuses a value; the reader of the error wrote these.
_CONFIG_NAMES = {
    "preferred_rows": "preferred_batch_size",
    "rows_max": "max_batch_size",
    "default_priority": "default_priority_level",
    "overrides": "priority_queue_policy",
}


def queue_policy(config: ModelConfig, queue_requests_max: int) -> QueuePolicy:
    """Rules for the model's queue, with `queue_requests_max` where the model sets no bound.

    Requests share batches only where dynamic_batching is set. Raises RepositoryError for
    impossible values.
    """
    batching = config.dynamic_batching
    batches = config.HasField("dynamic_batching") and config.max_batch_size > 0
    _check_wait("max_queue_delay_microseconds", batching.max_queue_delay_microseconds)
    default = _level(batching.default_queue_policy, queue_requests_max)
    try:
        return QueuePolicy(
            requests_max=default.requests_max,
            timeout_us_default=default.timeout_us_default,
            allow_timeout_override=default.allow_timeout_override,
            timeout_action=default.timeout_action,
            rows_max=config.max_batch_size if batches else 0,
            preferred_rows=tuple(sorted(set(batching.preferred_batch_size))),
            delay_us_max=batching.max_queue_delay_microseconds,
            priority_levels=batching.priority_levels,
            default_priority=batching.default_priority_level,
            overrides={
                priority: _level(policy, queue_requests_max)
                for priority, policy in sorted(batching.priority_queue_policy.items())
            },
        )
    except ValueError as error:
        raise RepositoryError(f"dynamic_batching: {_in_config_names(str(error))}") from None


def _level(policy: ModelQueuePolicy, queue_requests_max: int) -> LevelPolicy:
    _check_wait("default_timeout_microseconds", policy.default_timeout_microseconds)
    return LevelPolicy(
        requests_max=policy.max_queue_size or queue_requests_max,
        timeout_us_default=policy.default_timeout_microseconds,
        # Without this field a request that asks for a shorter wait would be kept waiting for
        # nothing; with a limit in the configuration the field decides, as its author expects.
        allow_timeout_override=policy.allow_timeout_override
        or policy.default_timeout_microseconds == 0,
        timeout_action=_action(policy.timeout_action),
    )


def _action(action: int) -> TimeoutAction:
    return "delay" if action == ModelQueuePolicy.DELAY else "reject"


def _check_wait(field: str, wait_us: int) -> None:
    if wait_us > WAIT_US_MAX:
        raise RepositoryError(
            f"dynamic_batching: {field} must be at most {WAIT_US_MAX} (a day), got {wait_us}"
        )


def _in_config_names(text: str) -> str:
    return re.sub(r"\w+", lambda word: _CONFIG_NAMES.get(word[0], word[0]), text)
