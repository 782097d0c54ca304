# SPDX-License-Identifier: Apache-2.0
"""A server's device for programs on the same host: tensors that never leave it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from thirdrail.device.arrays import DeviceArray, DeviceResult
from thirdrail.device.requests import device_request, uuid_of, worker_with
from thirdrail.errors import FailedPrecondition
from thirdrail.requests import InferOptions, Inputs, ParameterValue
from thirdrail.transport import needs_lane

if TYPE_CHECKING:
    from thirdrail.client import Client
    from thirdrail.lane.device_session import DeviceSession


class Device:
    """The device of one of a server's workers, by a client's session there.

        device = thirdrail.Device(client)
        x = device.empty((8, 3), "FP32")
        torch.from_dlpack(x).normal_()
        with device.infer("model", {"x": x}) as result:
            y = torch.from_dlpack(result["y"])

    client: a blocking client on the server's host; it stays the caller's.
    uuid: of the device, or a beginning of one; "" or "cuda": the server's first device.

    A stream is a number: `torch.cuda.current_stream().cuda_stream`, or any cudaStream_t; 0 is the
    default stream. `infer` runs after what its stream was given before, and what the stream is
    given afterwards runs after it: the program never waits. What uses a tensor on another stream
    has to be ordered with that of its request, also before its result is let go of.

    Safe to use from several threads. Raises FailedPrecondition where the server has no such device
    or shares it with nobody here, and where a package is missing here, with the line that installs
    it. Not yet run on a GPU.
    """

    def __init__(self, client: "Client", uuid: str = "") -> None:
        self._client = client
        self._session = _session_of(client, uuid_of(uuid))

    @property
    def uuid(self) -> str:
        return self._session.memory.uuid

    def empty(
        self, shape: Sequence[int] | int, dtype: npt.DTypeLike = np.float32, *, stream: int = 0
    ) -> DeviceArray:
        """A tensor to fill in and pass to `infer`, which reads it where it is.

        Raises ResourceExhausted when the server gives no more memory, InvalidArgument for text.
        """
        return self._session.empty(shape, dtype, stream)

    def array(self, array: npt.ArrayLike, *, stream: int = 0) -> DeviceArray:
        """A copy of an array on the host. Raises as `empty`."""
        source = np.asarray(array)
        made = self.empty(source.shape, source.dtype, stream=stream)
        made.copy_from(source, stream=stream)
        return made

    def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        outputs: Sequence[str] | None = None,
        on_host: Sequence[str] = (),
        stream: int = 0,
        timeout: float | None = None,
        version: int = 0,
        request_id: str | None = None,
        priority: int = 0,
        parameters: Mapping[str, ParameterValue] | None = None,
    ) -> DeviceResult:
        """Runs a model once, with tensors of this device, of the host, or both.

        inputs: a mapping from input names to tensors, or the tensor of a model's only input.
        outputs: those wanted, all by default. They are tensors of this device, until the result is
            released or all of them are gone; but for those `on_host`, which are arrays.

        Returns when the device was given the run, or is done where anything is on the host.
        Raises the request's error; TimedOut where the inputs were not ready in time, too.
        """
        description = self._client._description(model, version, timeout)
        options: InferOptions = {
            "outputs": outputs, "version": version, "request_id": request_id, "timeout": timeout,
            "priority": priority, "parameters": parameters,
        }  # fmt: skip
        head, tensors = device_request(model, inputs, description, on_host, options)
        return self._session.infer(head, tensors, stream=stream, timeout=timeout)


def _session_of(client: "Client", uuid: str) -> "DeviceSession":
    lanes = client._connected().lanes
    lane = lanes.home.lane()
    if lane is None:
        raise FailedPrecondition(needs_lane(client.transport))
    worker = worker_with(uuid, lanes.home.workers)
    if worker is not None:
        (access,) = lanes.to((worker,))
        lane = access.lane()
        if lane is None:
            raise FailedPrecondition(needs_lane(access.transport))
    return lane.device(uuid)
