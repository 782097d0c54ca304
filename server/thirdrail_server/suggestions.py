# SPDX-License-Identifier: Apache-2.0
"""`thirdrail serve --suggest-config`: the configuration each model would get, nothing served."""

import os
from collections.abc import Iterator

from thirdrail.errors import ThirdrailError
from thirdrail_engines import Inspector
from thirdrail_engines.compile_options import EngineChoice, OnFailure
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.host import cuda_devices
from thirdrail_engines.profiles import config_line, profiles_for, write_shape_range
from thirdrail_server.config import ServerConfig, WorkerConfig
from thirdrail_server.front.control.load_source import LoadSource, prepare
from thirdrail_server.repository.compilation import compile_options
from thirdrail_server.repository.layout import scan
from thirdrail_server.repository.suggest import suggest_config_text
from thirdrail_server.worker.loading import PreparedVersion, prepare_version

TENSORRTS = (EngineChoice.TENSORRT, EngineChoice.TENSORRT_RTX)


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
            notes = [*prepared.notes, *_profile_notes(prepared, config.worker)]
            head = "".join(f"# Note: {note}\n" for note in notes)
            yield head + suggest_config_text(prepared.config, command.config)


def _profile_notes(prepared: PreparedVersion, config: WorkerConfig) -> Iterator[str]:
    """The shapes that a TensorRT engine would be built for, where nobody said which."""
    options = compile_options(
        prepared.config,
        on_failure=OnFailure.FALLBACK,
        derive_batch_rows=config.derive_batch_rows,
    )
    if options.profiles or not (options.engine in TENSORRTS or cuda_devices()):
        return
    spec = prepared.engine.spec
    try:
        profiles = profiles_for(spec.inputs, (), options.rows, spec.unranked)
    except ModelFileError as error:
        yield f"TensorRT would not build it: {error}"
        return
    for number, profile in enumerate(profiles):
        for name, shapes in profile.inputs.items():
            line = config_line(f"profile.{number}.{name}", write_shape_range(shapes))
            yield f"derived, to be built for these shapes (smallest, best, largest): {line}"
