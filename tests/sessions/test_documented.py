# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/transport.md say what the code does."""

import dataclasses
import re
from pathlib import Path

import pytest

from thirdrail_server.config import ExportLimits, LaneLimits, SessionLimits
from thirdrail_server.worker.session_states import Event, Life, State

PAGE = (Path(__file__).parents[2] / "docs" / "transport.md").read_text()

# What a unit is in that of the field's name.
UNITS = {"": 1, "KiB": 1 << 10, "GiB": 1 << 30, "s": 1000, "h": 3_600_000}
NOT_LIMITS = {"uids", "huge_pages"}


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def documented_transitions() -> dict[tuple[State, Event], State]:
    table = rows("The life of a session")
    return {(State[state], Event[event]): State[after] for state, event, after in table}


def in_state(state: State) -> Life:
    life = Life()
    life.state = state
    return life


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_sessions_live_as_documented(state: State, event: Event) -> None:
    life, after = in_state(state), documented_transitions().get((state, event))
    if after is None and event not in (Event.END, Event.LET_GO):
        with pytest.raises(ValueError, match="cannot come in"):
            life.on(event)
    else:
        assert life.on(event) is (after or state)


@pytest.mark.parametrize("limits", [LaneLimits(), SessionLimits(), ExportLimits()])
def test_every_limit_is_documented_with_its_default(
    limits: LaneLimits | SessionLimits | ExportLimits,
) -> None:
    documented = {row[0].strip("`"): _value(row[1]) for row in rows("Limits")}
    actual = {
        field.name: field.default
        for field in dataclasses.fields(limits)
        if field.name not in NOT_LIMITS
    }
    assert {name: documented.get(name) for name in actual} == actual


def test_no_limit_is_documented_that_there_is_not() -> None:
    classes = (LaneLimits, SessionLimits, ExportLimits)
    actual = {field.name for each in classes for field in dataclasses.fields(each)}
    assert {row[0].strip("`") for row in rows("Limits")} <= actual


def _value(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+) ?(\w*)", text).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]
