# SPDX-License-Identifier: Apache-2.0
"""The answers to a client that asks for a device."""

from thirdrail.errors import ThirdrailError
from thirdrail.v1 import inference_pb2, lane_pb2
from thirdrail_server.worker.session_device import SessionDevice


def attached_message(
    request: lane_pb2.DeviceRequest, device: SessionDevice
) -> tuple[lane_pb2.LaneResponse, list[int]]:
    """The answer and the descriptors that go with it, which whoever sends it closes."""
    limits, events = device.limits, device.events
    is_cuda = bool(events.handles)  # a twin's events are memory
    attached = lane_pb2.DeviceAttached(
        request=request.request,
        uuid=device.device.facts.uuid,
        kind=lane_pb2.DEVICE_KIND_CUDA if is_cuda else lane_pb2.DEVICE_KIND_TWIN,
        input_epoch=device.input.epoch,
        output_epoch=device.output.epoch,
        input_arena_bytes=limits.input_arena_bytes_max,
        output_arena_bytes=limits.output_arena_bytes_max,
        places=limits.places_max,
        event_handles=events.handles,
    )
    return lane_pb2.LaneResponse(device_attached=attached), events.export()


def refused_message(
    request: lane_pb2.DeviceRequest, error: ThirdrailError
) -> lane_pb2.LaneResponse:
    status = inference_pb2.Status(reason=error.reason, message=error.message)
    refused = lane_pb2.DeviceAttached(request=request.request, status=status)
    return lane_pb2.LaneResponse(device_attached=refused)
