# SPDX-License-Identifier: Apache-2.0
"""What a worker's loads share for compiling: the plan cache, and the limits of builds.

Most models need no plan. So the cache is opened, and what compiles is imported, when the first one
does.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from thirdrail_engines.compile_options import CompileOptions
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.engine_choice import engine_order
from thirdrail_engines.host import host_of
from thirdrail_engines.plans import TellProgress
from thirdrail_server.config import CompileConfig, ConfigError

if TYPE_CHECKING:
    from thirdrail_engines.compiling import CompileServices
    from thirdrail_engines.cuda.device import Device
    from thirdrail_engines.plan_cache import PlanCache

log = logging.getLogger(__name__)


class Plans:
    """Safe to use from several threads."""

    def __init__(
        self, config: CompileConfig, device: "Callable[[], Device | None]" = lambda: None
    ) -> None:
        """device: where engines for a GPU go; asked for when the first of them comes."""
        self._config = config
        self._device = device
        self._opening = threading.Lock()
        self._cache: PlanCache | None = None

    def services(self, tell: TellProgress, cancelled: threading.Event) -> "CompileServices":
        """For one load. Raises ModelFileError when the cache's folder is not to be trusted."""
        import thirdrail_engines.one_engine  # noqa: F401 - which the load would import otherwise
        from thirdrail_engines.builds import BuildLimits
        from thirdrail_engines.compiling import CompileServices

        limits = BuildLimits(
            seconds_max=self._config.build_s_max,
            memory_bytes_max=self._config.build_memory_bytes_max,
            builds_at_once_max=self._config.builds_at_once_max,
        )
        cache, device = self._open_cache(), self._device()
        return CompileServices(cache, limits, tell, cancelled, device=device)

    def close(self) -> None:
        with self._opening:
            if self._cache is not None:
                self._cache.close()
                self._cache = None

    def _open_cache(self) -> "PlanCache | None":
        if self._config.cache_dir is None:
            return None
        from thirdrail_engines.plan_cache import CacheFolderError, PlanCache

        with self._opening:
            if self._cache is None:
                try:
                    self._cache = PlanCache(
                        self._config.cache_dir,
                        self._config.cache_bytes_max,
                        self._config.read_only_caches,
                    )
                except CacheFolderError as error:
                    raise ModelFileError(str(error)) from None
                except OSError as error:  # neither there nor for temporary files can be written
                    log.warning("plans are not kept: %s", error)
            return self._cache


def refuse_untrusted_caches(config: CompileConfig) -> None:
    """Before anything is loaded. Raises ConfigError for a cache that others could have filled."""
    from thirdrail_engines.plan_cache import CacheFolderError
    from thirdrail_engines.plan_cache.trust import check_folder

    folders = (config.cache_dir, *config.read_only_caches)
    for folder in filter(None, folders):
        try:
            check_folder(folder)
        except CacheFolderError as error:
            raise ConfigError(str(error)) from None
        except OSError as error:
            # Ours is made when it is needed, and done without where that fails.
            if folder is not config.cache_dir:
                text = f"the read-only plan cache {folder}: {error.strerror}"
                raise ConfigError(text) from None


def may_build(path: Path, options: CompileOptions) -> bool:
    """Whether an engine that may run this model needs a plan. Quick, and says yes in doubt."""
    order = engine_order(path.suffix, options, host_of(path.suffix), keeps_plans=True)
    return any(candidate.builder is not None for candidate in order)
