"""A few runs of `python -m tests.soak`, with tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.soak.draw import draw
from tests.soak.models import available
from tests.soak.trial import Soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_processes_with_random_budgets_keep_to_them_and_answer_right(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    models = available(short=True)
    soak = Soak(models, tmp_path / "cache")
    try:
        reports = [soak.run(draw(seed, {name: known for name, (known, _) in models.items()})) for seed in range(3)]
    finally:
        soak.unlimited.close()
    assert [one.failures for one in reports if one.failures] == []
    assert sum(one.answers for one in reports) > 3
