# SPDX-License-Identifier: Apache-2.0
"""The first exchange on a lane, for threads: who we are, and what we may use."""

import socket
import time

from thirdrail.lane.attach import HELLO_TIMEOUT_S, not_answered, refused
from thirdrail.lane.blocking import BlockingLane
from thirdrail.lane.blocking_wire import BlockingWire, LaneBroken
from thirdrail.lane.busy_poll import LONGEST_US
from thirdrail.lane.packets import close_all
from thirdrail.lane.wire import (
    ATTACH_PACKET_BYTES_MAX,
    DEBUG_FEATURE,
    DEVICE_FEATURE,
    VERSION_MAX,
    VERSION_MIN,
)
from thirdrail.v1 import lane_pb2


def attach_lane(
    sock: socket.socket,
    token: bytes = b"",
    *,
    client_name: str = "",
    busy_poll_us: int = LONGEST_US,
    is_debug: bool = False,
) -> BlockingLane:
    """Say hello on a connected socket, which the lane then owns.

    token: from OpenSession; none on a socket that was inherited from the worker's parent.
    Raises CannotAttach when the worker does not answer within HELLO_TIMEOUT_S, or refuses us.
    """
    hello = lane_pb2.Hello(
        version_min=VERSION_MIN,
        version_max=VERSION_MAX,
        features=[DEVICE_FEATURE, DEBUG_FEATURE] if is_debug else [DEVICE_FEATURE],
        token=token,
        client_name=client_name,
    )
    wire = BlockingWire(sock, busy_poll_us=busy_poll_us)
    try:
        return BlockingLane(wire, _attached(wire, hello), is_debug=is_debug)
    except BaseException:
        wire.close()
        raise


def _attached(wire: BlockingWire, hello: lane_pb2.Hello) -> lane_pb2.Attached:
    deadline_s = time.monotonic() + HELLO_TIMEOUT_S
    packet = lane_pb2.LaneRequest(hello=hello).SerializeToString()
    try:
        wire.send(packet, deadline_s)
        received = wire.receive(ATTACH_PACKET_BYTES_MAX, deadline_s)
    except LaneBroken as error:
        raise not_answered(str(error)) from None
    if received is None:
        raise not_answered("the worker did not answer the lane's hello")
    message, fds = received
    close_all(fds)
    if message.HasField("goodbye"):
        raise refused(message.goodbye.status)
    if not message.HasField("attached"):
        raise not_answered("the worker broke the lane's rules: its first packet is no answer")
    return message.attached
