"""Each row of `python -m tests.system` keeps its promise."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.system.rows import Row
from tests.system.table import ROWS

pytestmark = [pytest.mark.timeout(1800), pytest.mark.xdist_group("system")]


def _marks(row: Row) -> list[pytest.MarkDecorator]:
    return [pytest.mark.survey] if row.long else [pytest.mark.slow] if row.slow else []


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name, marks=_marks(row)) for row in ROWS])
def test_what_the_row_says_comes_of_its_fault(row: Row, tmp_path: Path) -> None:
    if reason := row.lacks():
        pytest.skip(reason)
    found = row.make(tmp_path)
    assert found.runs
    assert not found.failures, "\n".join(found.failures)
