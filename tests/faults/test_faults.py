"""Whichever event fails, the caller gets one true error, the next call works, and nothing is lost.

The ordinary tests try the first, the middle and the last event of each kind; the slow ones points between these.
`python -m tests.faults` tries all.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tests.faults.injector import FAULTS, KINDS, Injector
from tests.faults.operations import OPERATIONS, prepare
from tests.faults.trial import attempt
from tests.faults.walk import Cell, answer_of, walk
from tests.marks import slow
from tests.shared import folder_of_the_run, made_by_one

from pipeload.pipeline import pipeline as pipelines
from pipeload.pipeline.session import to_array
from pipeload.storage.buffers import Buffer

pytest.importorskip("onnx")
pytest.importorskip("torch")

_QUICK = ("run", "generate", "export")
_SLOW_POINTS = 4
_FEW_POINTS = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by_one(folder_of_the_run(tmp_path_factory) / "faults", prepare)


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    """Each try collects garbage, and need not look at all that was there before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _quick(count: int) -> list[int]:
    return sorted({1, count // 2 + 1, count}) if count else []


@pytest.mark.parametrize("name", _QUICK)
def test_the_first_the_middle_and_the_last_event_of_each_kind(models: Path, name: str) -> None:
    operation = OPERATIONS[name]
    answer = answer_of(operation, models)
    tried, broken = 0, dict[str, str]()
    for kind in KINDS:
        count = attempt(operation, Injector(kind=kind), models, answer).count
        for place, number in enumerate(_quick(count)):
            fault = FAULTS[kind][place % len(FAULTS[kind])]
            cell = Cell(operation=name, kind=kind)
            deque(walk(cell, models, answer, points=lambda _, at=number: [at], faults=[fault]), 0)
            tried += cell.tried
            broken |= cell.failures
    assert not broken
    assert tried > 2 * len(KINDS)


@pytest.mark.parametrize("name", [*map(slow, OPERATIONS)])
def test_points_of_each_kind(models: Path, name: str) -> None:
    operation = OPERATIONS[name]
    answer = answer_of(operation, models)
    most = _FEW_POINTS if operation.slow else _SLOW_POINTS

    def points(count: int) -> range:
        # Not the first of them each time, which the ordinary tests have.
        step = max(1, count // most)
        return range((step + 1) // 2, count + 1, step)

    broken: dict[str, str] = {}
    for kind in KINDS:
        cell = Cell(operation=name, kind=kind)
        deque(walk(cell, models, answer, points=points), 0)
        broken |= cell.failures
    assert not broken


@pytest.mark.parametrize(
    ("kind", "planted", "told"),
    [
        ("read", "an answer is wrong", "an answer is wrong"),
        ("allocation", "a buffer is lost", "buffers were not given back"),
        ("open", "a descriptor is lost", "descriptors are open"),
        ("thread", "another error", "a foreign exception crossed the API"),
    ],
)
def test_a_broken_promise_is_found(
    models: Path, monkeypatch: pytest.MonkeyPatch, kind: str, planted: str, told: str
) -> None:
    operation = OPERATIONS["run"]
    answer = answer_of(operation, models)
    _plant(planted, monkeypatch)
    result = attempt(operation, Injector(kind=kind, fault=FAULTS[kind][0], at=4), models, answer)
    assert any(told in failure for failure in result.failures), result


def _plant(planted: str, patch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    match planted:
        case "an answer is wrong":
            patch.setattr("pipeload.model.to_array", lambda value: to_array(value) + 1)
        case "a buffer is lost":
            patch.setattr(Buffer, "close", kept.append)
        case "a descriptor is lost":
            patch.setattr(os, "close", kept.append)
        case _:
            patch.setattr(pipelines, "foreign_errors", lambda *_: nullcontext())
