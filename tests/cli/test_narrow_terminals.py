# SPDX-License-Identifier: Apache-2.0
"""On a terminal that is narrower than what is printed, nothing is cut and nothing is torn apart."""

import pytest
from rich.console import Group
from rich.text import Text

from thirdrail.cli.session import new_table, print_notes, print_whole

NAME = "a_model_with_a_long_name" * 4
COMMAND = "thirdrail compile a.onnx --for sm89 --profile x=1x3x32x32,4x3x64x64,8x3x128x128"


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal; a dumb one has 80 columns
    monkeypatch.setenv("TERM", "dumb")


def test_a_table_is_as_wide_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("NAME", "BYTES", "", right=("BYTES",))
    table.add_row(NAME, "12345678901234567890", "")
    print_whole(Group(Text("title"), table))
    title, heading, row = capsys.readouterr().out.splitlines()
    assert (title.rstrip(), heading.split()) == ("title", ["NAME", "BYTES"])
    assert row.split() == [NAME, "12345678901234567890"]


def test_a_note_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    print_notes([("a[x]", COMMAND), ("b", "short")])
    assert capsys.readouterr().out.splitlines() == ["", f"a[x]: {COMMAND}", "b: short"]
    print_notes([])
    assert capsys.readouterr().out == ""
