# SPDX-License-Identifier: Apache-2.0
"""`thirdrail` as typed, in this process, against the shared server."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from typer.testing import CliRunner

from support.server import RunningServer
from thirdrail.cli.app import app


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Thirdrail = Callable[..., Outcome]


@pytest.fixture
def typed() -> Thirdrail:
    """typed("models", "--json"): no server is named."""

    def run(*args: str, stdin: bytes | None = None) -> Outcome:
        result = CliRunner().invoke(app, list(args), input=stdin, prog_name="thirdrail")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def thirdrail(
    server: RunningServer, typed: Thirdrail, monkeypatch: pytest.MonkeyPatch
) -> Thirdrail:
    """The same, with $THIRDRAIL_URL naming the shared server."""
    monkeypatch.setenv("THIRDRAIL_URL", server.url)
    return typed
