"""Every family answers as transformers does, or is refused; none answers wrongly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.families.catalog import FAMILIES, UNTRIED
from tests.families.compare import LIMIT, compare, difference, same_tokens
from tests.families.table import PAGE, read_results, table

_LIST = """
from optimum.exporters.tasks import TasksManager
import optimum.exporters.onnx.model_configs
from pipeload_export.source.task import TASKS
for name, kinds in TasksManager._SUPPORTED_MODEL_TYPE.items():
    if TASKS.keys() & kinds.get("onnx", {}).keys():
        print(name)
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if family.quick else pytest.mark.survey)
        for name, family in FAMILIES.items()
    ],
)
def test_family_answers_as_the_source_or_is_refused(name: str, tmp_path: Path) -> None:
    result = compare(name, tmp_path / "family")
    assert result.verdict != "wrong", result.reason
    before = read_results().get(name)
    if before is not None and before.verdict == "right":
        assert result.verdict == "right", result.reason
        new = result.refused_cases.keys() - before.refused_cases.keys()
        assert not new, f"calls that worked are refused: {[result.refused_cases[case] for case in new]}"


@pytest.mark.survey
def test_every_family_that_can_be_exported_is_tried() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LIST],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    tried = {family.model_type for family in FAMILIES.values()}
    assert set(done.stdout.split()) - UNTRIED.keys() == tried


def test_page_has_the_latest_results() -> None:
    assert table(read_results()) in PAGE.read_text()


def test_difference_is_over_the_range_and_leaves_out_what_a_mask_hides() -> None:
    expected = np.array([[[0.0, 10.0], [5.0, 5.0]]])
    assert difference(expected, expected + 1, None) == pytest.approx(0.1)
    given = expected.copy()
    given[0, 1] = 99
    assert difference(expected, given, np.array([[1, 0]])) == 0
    assert difference(expected, given[:, :1], None) == float("inf")
    given[0, 0, 0] = np.nan
    assert difference(expected, given, None) == float("inf")


def test_token_may_differ_only_where_the_two_best_are_equal() -> None:
    apart, tied = [0.5, 0.5, 0.5], [0.5, LIMIT / 2, 0.5]
    assert same_tokens([1, 2, 3], [1, 2, 3], apart) == (3, 3)
    assert same_tokens([1, 2, 3], [1, 9, 3], apart) == (1, 3)
    assert same_tokens([1, 2, 3], [1, 9, 3], tied) == (1, 1)
