# SPDX-License-Identifier: Apache-2.0
"""Each honoured field of the field table has its effect: one check per row, none missing."""

from pathlib import Path

import pytest

from repository import honoured_fields, honoured_queues, honoured_warmup
from repository.honoured import CHECKS, options
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.fields import FIELDS, Fate

TABLES = (honoured_fields, honoured_queues, honoured_warmup)  # each has added its checks


def test_options_warn_about_harmless_fields_and_refuse_the_refused() -> None:
    assert options("response_cache { enable: true }").warnings == (
        "response_cache.enable is ignored: every request is computed",
    )
    assert options("").warnings == ()
    with pytest.raises(RepositoryError, match="models with sequences are not served"):
        options("sequence_batching {}")


def test_every_honoured_row_has_a_check() -> None:
    assert CHECKS.keys() == {path for path, rule in FIELDS.items() if rule.fate is Fate.HONOURED}


@pytest.mark.parametrize("path", sorted(CHECKS))
def test_honoured(path: str, tmp_path: Path) -> None:
    CHECKS[path](tmp_path)
