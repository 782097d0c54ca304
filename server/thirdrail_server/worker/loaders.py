# SPDX-License-Identifier: Apache-2.0
"""The threads that load model versions, and what their loads share.

Every load begins on one of a few threads. One that turns out to need a build gives that thread
back and begins anew on another kind, of which there are more: those wait for builds. So however
many wait, a load whose plan is there, or that needs none, gets past them.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from thirdrail_engines import Inspector
from thirdrail_engines.compile_options import OnFailure
from thirdrail_engines.plans import TellProgress
from thirdrail_server.config import WorkerConfig
from thirdrail_server.control_messages import LoadCommand
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.compilation import compile_options
from thirdrail_server.repository.errors import blaming
from thirdrail_server.worker.loading import EngineWish, PreparedVersion, prepare_version
from thirdrail_server.worker.memory import Scale, Weighing
from thirdrail_server.worker.plans import Plans, may_build
from thirdrail_server.worker.worker_device import WorkerDevice

if TYPE_CHECKING:
    from thirdrail_engines.compiling import CompileServices

WAITING = "waiting to build"  # the phase that is told

LOOK_S = 1.0  # between two looks at runs of loads

Building = Callable[[], AbstractContextManager[None]]
Prepare = Callable[[Callable[[Weighing], Building]], PreparedVersion]


class _BuildNeeded(Exception):
    """Not on this thread."""


class Loaders:
    """Of one worker; lives on its loop."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._cores = config.threads_max or len(os.sched_getaffinity(0))
        self._inspector = Inspector()
        device = WorkerDevice(config.device)
        self.shared_bytes = device.shared_bytes
        self._check_runs = device.check_runs
        self._scale = Scale(device.taken_bytes) if config.device else Scale()
        self._plans = Plans(config.compiling, device.opened)
        self._threads = ThreadPoolExecutor(config.loads_at_once_max, thread_name_prefix="loader")
        waiting_max = config.compiling.loads_at_once_max
        self._builders = ThreadPoolExecutor(waiting_max, thread_name_prefix="builder")
        # Of what serves already: whoever does not serve yet gets past them.
        self._improvers = ThreadPoolExecutor(waiting_max, thread_name_prefix="improver")

    async def prepare(
        self,
        command: LoadCommand,
        version: int,
        path: Path,
        tell: TellProgress,
        cancelled: threading.Event,
    ) -> PreparedVersion:
        """Raises ModelFileError or RepositoryError, DeviceLost; then nothing is left loaded."""
        given, config = command.config or ModelConfig(), self._config
        with blaming(command.name):
            options = compile_options(
                given,
                on_failure=OnFailure.FALLBACK if config.compiling.falls_back else OnFailure.FAIL,
                derive_batch_rows=config.derive_batch_rows,
            )
        builds = await asyncio.to_thread(may_build, path, options)
        services: CompileServices | None = None

        def prepare(building_of: Callable[[Weighing], Building]) -> PreparedVersion:
            nonlocal services
            if builds and services is None:  # before the weighing: what compiles is imported here
                services = self._plans.services(tell, cancelled)
            with self._scale.weigh() as weighing:
                if services is not None:
                    services = replace(services, building=building_of(weighing))
                prepared = prepare_version(
                    command.name,
                    version,
                    path,
                    command.config,
                    config,
                    self._cores,
                    self._inspector,
                    tell,
                    EngineWish(options, services, command.takes_stopgap, command.instances),
                )
                return replace(prepared, weight=weighing.end(path.parent))

        try:
            return await self._watched(self._threads, prepare, lambda _: _not_here)
        except _BuildNeeded:
            tell(WAITING, 0, 0)
            threads = self._builders if command.takes_stopgap else self._improvers
            return await self._watched(threads, prepare, lambda weighing: weighing.aside)

    async def _watched(
        self,
        threads: ThreadPoolExecutor,
        prepare: Prepare,
        building_of: Callable[[Weighing], Building],
    ) -> PreparedVersion:
        """A run that never ends holds its thread for ever, and with it the load."""
        running = asyncio.get_running_loop().run_in_executor(threads, prepare, building_of)
        while not running.done():
            await asyncio.wait((running,), timeout=LOOK_S)
            self._check_runs()
        return running.result()

    def close(self) -> None:
        """No load is under way any more."""
        self._plans.close()


def _not_here() -> AbstractContextManager[None]:
    raise _BuildNeeded
