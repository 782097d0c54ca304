# SPDX-License-Identifier: Apache-2.0
"""What a lane session knows of the worker around it."""

from typing import TYPE_CHECKING, Protocol

from thirdrail.v1 import lane_pb2
from thirdrail_engines.engine import DeviceLost
from thirdrail_server.config import LaneLimits
from thirdrail_server.worker.arena_ledger import ArenaLedger
from thirdrail_server.worker.chunks import MakeChunk
from thirdrail_server.worker.device_regions import DeviceRegions
from thirdrail_server.worker.export_desk import ExportDesk
from thirdrail_server.worker.farewells import Farewells
from thirdrail_server.worker.janitor import Janitor
from thirdrail_server.worker.lane_device import LaneDevice
from thirdrail_server.worker.models import ModelTable

if TYPE_CHECKING:
    from thirdrail_server.worker.lane_session import LaneSession


class Host(Protocol):
    """The worker around its sessions."""

    models: ModelTable
    limits: LaneLimits
    quarantine_s: float
    janitor: Janitor
    farewells: Farewells
    ledger: ArenaLedger
    exports: ExportDesk
    make_chunk: MakeChunk
    regions: DeviceRegions
    lane_device: LaneDevice

    def admit(self, session: "LaneSession", hello: lane_pb2.Hello) -> int:
        """Let a client in: the session's number. Raises PermissionDenied or ResourceExhausted."""
        ...

    def on_device_lost(self, error: DeviceLost) -> None:
        """The process is to end."""
        ...

    def freed(self, session: "LaneSession") -> None:
        """Its memory is given back, and nothing of it is left."""
        ...
