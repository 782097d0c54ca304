# SPDX-License-Identifier: Apache-2.0
"""A server's device for asyncio programs on the same host, the twin of `device.Device`."""

import asyncio
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from thirdrail.device.arrays import DeviceArray, DeviceResult
from thirdrail.device.requests import device_request, uuid_of, worker_with
from thirdrail.errors import FailedPrecondition
from thirdrail.lane.calls import timed_out
from thirdrail.requests import InferOptions, Inputs, ParameterValue
from thirdrail.transport import needs_lane

if TYPE_CHECKING:
    from thirdrail.aio import AsyncClient
    from thirdrail.lane.aio_device_session import AsyncDeviceSession
    from thirdrail.lane.aio_session import AsyncSession


class AsyncDevice:
    """The device of one of a server's workers, by an AsyncClient's session there.

        device = await thirdrail.aio.AsyncDevice(client)
        x = await device.empty((8, 3), "FP32")
        torch.from_dlpack(x).normal_()
        with await device.infer("model", {"x": x}) as result:
            y = torch.from_dlpack(result["y"])

    client: an AsyncClient on the server's host; it stays the caller's.
    uuid: of the device, or a beginning of one; "" or "cuda": the server's first device.

    Await it once, which raises what making a `Device` raises; then it is used as that, in the event
    loop of its client. Streams are the same; a stream's work is in the order of the awaits that
    gave it. What waits for a stream on the host blocks, and is not for the loop's thread:
    `await asyncio.to_thread(array.numpy)`, and `copy_from`. Results may be released in any thread.
    Not yet run on a GPU.
    """

    def __init__(self, client: "AsyncClient", uuid: str = "") -> None:
        self._client = client
        self._wanted = uuid_of(uuid)
        self._found: AsyncSession | None = None

    def __await__(self) -> Generator[Any, None, Self]:
        return self._attached().__await__()

    async def _attached(self) -> Self:
        self._found = await _session_of(self._client, self._wanted)
        return self

    @property
    def uuid(self) -> str:
        return self._session.memory.uuid

    async def empty(
        self, shape: Sequence[int] | int, dtype: npt.DTypeLike = np.float32, *, stream: int = 0
    ) -> DeviceArray:
        """A tensor to fill in and pass to `infer`, which reads it where it is.

        Raises ResourceExhausted when the server gives no more memory, InvalidArgument for text.
        """
        return await self._session.empty(shape, dtype, stream)

    async def array(self, array: npt.ArrayLike, *, stream: int = 0) -> DeviceArray:
        """A copy of an array on the host. Raises as `empty`."""
        source = np.asarray(array)
        made = await self.empty(source.shape, source.dtype, stream=stream)
        await asyncio.to_thread(partial(made.copy_from, source, stream=stream))
        return made

    async def infer(
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
        session = self._session
        description = await self._client._description(model, version, timeout)
        options: InferOptions = {
            "outputs": outputs, "version": version, "request_id": request_id, "timeout": timeout,
            "priority": priority, "parameters": parameters,
        }  # fmt: skip
        head, tensors = device_request(model, inputs, description, on_host, options)
        try:
            async with asyncio.timeout(timeout):
                return await session.infer(head, tensors, self._client._encoder, stream=stream)
        except TimeoutError:
            raise timed_out(timeout) from None

    @property
    def _session(self) -> "AsyncDeviceSession":
        if self._found is None:
            raise FailedPrecondition(
                "this device was not awaited: device = await AsyncDevice(client)"
            )
        return self._found.device


async def _session_of(client: "AsyncClient", uuid: str) -> "AsyncSession":
    lanes = client._connected().lanes
    session = await lanes.home.session()
    if session is None:
        raise FailedPrecondition(needs_lane(client.transport))
    worker = worker_with(uuid, lanes.home.workers)
    if worker is not None:
        (access,) = lanes.to((worker,))
        session = await access.session()
        if session is None:
            raise FailedPrecondition(needs_lane(access.transport))
    await session.device.opening.attach(uuid)
    return session
