# SPDX-License-Identifier: Apache-2.0
"""Class labels: one per line of the file that an output's `label_filename` names."""

from pathlib import Path

from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.paths import read_bounded, resolve_inside

LABEL_FILE_BYTES_MAX = 16 << 20


def labels(config: ModelConfig, folder: Path) -> dict[str, tuple[str, ...]]:
    """Labels by output name, for the outputs that have some; `folder` is the model's.

    Raises RepositoryError when a file is missing, outside the folder, too large or not UTF-8.
    """
    return {
        output.name: _lines(folder, output.name, output.label_filename)
        for output in config.output
        if output.label_filename
    }


def _lines(folder: Path, output: str, filename: str) -> tuple[str, ...]:
    what = f"the label file of output '{output}'"
    path = resolve_inside(folder.resolve(), folder, filename, what)
    data = read_bounded(path, LABEL_FILE_BYTES_MAX, what)
    try:
        lines = data.decode().split("\n")  # splitlines() would also split inside some labels
    except UnicodeDecodeError as error:
        raise RepositoryError(f"{what} is not UTF-8 text: byte {error.start} is wrong") from None
    if not lines[-1]:
        lines.pop()
    return tuple(line.removesuffix("\r") for line in lines)
