# SPDX-License-Identifier: Apache-2.0
"""`thirdrail serve --suggest-config`: the configuration each model would get, nothing served."""

import os
from collections.abc import Iterator

from thirdrail.errors import ThirdrailError
from thirdrail_engines import Inspector
from thirdrail_engines.engine import ModelFileError
from thirdrail_server.config import ServerConfig
from thirdrail_server.front.control.load_source import LoadSource, prepare
from thirdrail_server.repository.layout import scan
from thirdrail_server.repository.suggest import suggest_config_text
from thirdrail_server.worker.loading import prepare_version


def suggestions(config: ServerConfig) -> Iterator[str]:
    """A config.pbtxt text per model, by name; for one that cannot be served, a comment says why.

    Raises RepositoryError when there is no readable repository.
    """
    cores = config.worker.threads_max or len(os.sched_getaffinity(0))
    with Inspector() as inspector:
        for name in sorted(scan(config.repository)):
            try:
                command = prepare(name, LoadSource(config.repository)).command
                version, path = command.versions[-1]
                prepared = prepare_version(
                    name,
                    version,
                    path,
                    command.config,
                    config.worker,
                    cores,
                    inspector,
                    lambda _phase, _step, _steps: None,
                )
            except (ThirdrailError, ModelFileError) as error:
                yield f"# Model '{name}' cannot be served: {error}\n"
                continue
            prepared.engine.close()
            notes = "".join(f"# Note: {note}\n" for note in prepared.notes)
            yield notes + suggest_config_text(prepared.config, command.config)
