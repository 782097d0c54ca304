# SPDX-License-Identifier: Apache-2.0
"""The worker's device as its lane sessions see it: opened when the first of them asks for it.

What shares its memory is decided for each client: see `sharing`.
"""

import dataclasses
import os
import threading
from pathlib import Path

from thirdrail.errors import FailedPrecondition, InvalidArgument
from thirdrail_engines import cuda_engines
from thirdrail_engines.cuda.device import Device, Stream
from thirdrail_engines.cuda.sharing import How, Peers, choose_sharing
from thirdrail_engines.plans import BuildError
from thirdrail_server.config import DeviceLimits, SessionLimits, WorkerConfig
from thirdrail_server.worker.arena_ledger import Account, ArenaLedger
from thirdrail_server.worker.chunks import charge_nothing
from thirdrail_server.worker.session_device import SessionDevice


class LaneDevice:
    """Lives on the worker's loop; `attach` is called beside it."""

    def __init__(self, config: WorkerConfig) -> None:
        self.limits = config.lane_device
        self.ledger = ArenaLedger(_limits_on_device(config.sessions, config.lane_device))
        self._worker = config.name
        self._uuid = config.device
        self._lock = threading.Lock()
        self._opened: tuple[Device, Stream] | None = None

    def attach(self, uuid: str, uid: int, account: Account | None) -> SessionDevice:
        """What a new session of a client gets. uuid: of the device, or how it begins; empty: any.

        Raises FailedPrecondition where there is nothing to get, InvalidArgument for another
        device, CudaError, DeviceLost.
        """
        device, stream = self._device()
        facts = device.facts
        if uuid and not facts.uuid.lower().startswith(uuid.lower()):
            raise InvalidArgument(
                f"this session's worker computes on {facts.uuid} ({facts.name}), not on "
                f"{uuid[:80]!a}"
            )
        peers = Peers(uses_mps=_uses_mps(), is_trusted=uid in (0, os.geteuid()))
        sharing = choose_sharing(facts, device.capabilities, peers)
        if sharing.how is not How.VIRTUAL_MEMORY:
            raise FailedPrecondition(
                f"{facts.uuid} ({facts.name}) shares no memory with this client, tensors go by "
                f"host memory: {sharing}"
            )
        charge = charge_nothing if account is None else account.charge
        return SessionDevice(device, stream, self.limits, charge)

    def _device(self) -> tuple[Device, Stream]:
        with self._lock:
            if self._opened is None:
                if not self._uuid:
                    raise FailedPrecondition(
                        f"worker '{self._worker}' computes on the CPU and has no device memory; "
                        "use arrays on the host"
                    )
                try:
                    device = cuda_engines.own_device(self._uuid)
                except BuildError as error:
                    raise FailedPrecondition(str(error)) from None
                self._opened = device, device.new_stream()
            return self._opened


def _limits_on_device(limits: SessionLimits, device: DeviceLimits) -> SessionLimits:
    return dataclasses.replace(
        limits,
        arena_bytes_per_uid_max=device.arena_bytes_per_uid_max,
        arena_bytes_total_max=device.arena_bytes_total_max,
    )


def _uses_mps() -> bool:
    """Whether clients of this host go through CUDA's multi-process service."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")  # noqa: S108 - CUDA's
    return (Path(folder) / "control").exists()
