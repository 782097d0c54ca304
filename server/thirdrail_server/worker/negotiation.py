# SPDX-License-Identifier: Apache-2.0
"""What a worker answers to a hello: the version and the features that both ends know."""

from thirdrail.errors import Unimplemented
from thirdrail.v1 import lane_pb2
from thirdrail_server.config import LaneLimits

VERSION_MIN = 1
VERSION_MAX = 1

DEBUG = "debug"  # released output slots are overwritten, so that late readers see it
DEVICE = "device"  # the client may ask for memory on the worker's device
FEATURES = frozenset({DEBUG, DEVICE})


def agreed_version(hello: lane_pb2.Hello) -> int:
    """Raises Unimplemented where there is none."""
    version = min(VERSION_MAX, hello.version_max)
    if version < max(VERSION_MIN, hello.version_min):
        raise Unimplemented(
            f"this worker speaks lane versions {VERSION_MIN} to {VERSION_MAX}, the client "
            f"{hello.version_min} to {hello.version_max}"
        )
    return version


def agreed_features(hello: lane_pb2.Hello) -> frozenset[str]:
    return FEATURES.intersection(hello.features)


def limits_message(limits: LaneLimits) -> lane_pb2.Limits:
    return lane_pb2.Limits(
        packet_bytes=limits.packet_bytes_max,
        inline_bytes=limits.inline_bytes_max,
        calls_in_flight=limits.calls_in_flight_max,
        input_arena_bytes=limits.input_arena_bytes_max,
        output_arena_bytes=limits.output_arena_bytes_max,
        model_ids=limits.model_ids_max,
    )
