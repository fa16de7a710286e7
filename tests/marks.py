"""Parameters that only `make test-slow` or `make test-survey` runs."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["slow", "survey"]


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def survey(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.survey)
