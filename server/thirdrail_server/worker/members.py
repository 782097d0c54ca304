# SPDX-License-Identifier: Apache-2.0
"""A request among those that run together, and what it gets of the run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from thirdrail.errors import ThirdrailError
from thirdrail.v1 import inference_pb2, tensor_pb2
from thirdrail_server.worker.chunks import Bytes
from thirdrail_server.worker.device_tensors import DeviceTensor
from thirdrail_server.worker.output_arena import OutputArena
from thirdrail_server.worker.requests import Request
from thirdrail_server.worker.session_device import DeviceCall


@dataclass(slots=True)
class Member:
    """One request of a batch and the output memory of whoever sent it."""

    request: Request
    arena: OutputArena
    inline_bytes_max: int
    device: DeviceCall | None = None  # for a request with tensors there


@dataclass(frozen=True, slots=True)
class PlacedResult:
    """One that stays on the device. ref: its call's lease; None: it is in memory of others."""

    ref: tensor_pb2.ArenaRef | None
    tensor: DeviceTensor


@dataclass(slots=True)
class Outcome:
    """What one member gets: outputs, or an error. It owns its slots until the outputs are sent.

    The outputs are written into the response at once: as messages of their own they would be
    copied into it. placed: those that are written on the device, by name.
    """

    arena: OutputArena
    error: ThirdrailError | None = None
    response: inference_pb2.InferResponse = field(default_factory=inference_pb2.InferResponse)
    copies: int = 0
    leases: list[tensor_pb2.ArenaRef] = field(default_factory=list)
    placed: dict[str, PlacedResult] = field(default_factory=dict)

    @property
    def outputs(self) -> Sequence[tensor_pb2.Tensor]:
        return self.response.outputs

    def lease(self, size: int) -> tuple[tensor_pb2.ArenaRef, Bytes]:
        """See OutputArena.lease."""
        ref, memory = self.arena.lease(size)
        self.leases.append(ref)
        return ref, memory

    def give_back(self, ref: tensor_pb2.ArenaRef) -> None:
        """One of its slots was not needed."""
        self.leases.remove(ref)
        self.arena.release(ref.epoch, ref.slot, ref.generation)

    def discard(self) -> None:
        """Nobody will read it: give its slots back."""
        for ref in self.leases:
            self.arena.release(ref.epoch, ref.slot, ref.generation)
        self.leases.clear()

    def fail(self, error: ThirdrailError) -> None:
        """An error in place of everything that was there."""
        self.discard()
        self.placed.clear()
        self.response = inference_pb2.InferResponse()
        # Its traceback would keep the run's frames, and in them this outcome: a cycle that holds
        # the session's memory until the garbage collector comes by.
        self.error = error.with_traceback(None)
