# SPDX-License-Identifier: Apache-2.0
"""What makes the options of one panel."""

from typing import Protocol

import typer


class MakeOption(Protocol):
    def __call__(
        self, text: str, *names: str, metavar: str | None = None
    ) -> typer.models.OptionInfo: ...


def in_panel(panel: str) -> MakeOption:
    def option(text: str, *names: str, metavar: str | None = None) -> typer.models.OptionInfo:
        made = typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)
        assert isinstance(made, typer.models.OptionInfo)
        return made

    return option
