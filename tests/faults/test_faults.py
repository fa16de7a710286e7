"""Whichever event fails, the caller gets one true error, the next call works, and nothing is lost.

The ordinary tests plant faults, which have to be found, and try the first, the middle and the last event of each kind
in `run`. The slow tests and the surveys try points between these, and the other operations.
`python -m tests.faults` tries all.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.injector import FAULTS, KINDS, Injector
from tests.faults.operations import OPERATIONS, prepare
from tests.faults.trial import attempt
from tests.faults.walk import Cell, some_points, untouched, walk
from tests.marks import slow, survey
from tests.shared import folder_of_the_run, made_by_one

from pipeload.pipeline.session import to_array
from pipeload.storage.buffers import Buffer

pytest.importorskip("onnx")
pytest.importorskip("torch")

pytestmark = pytest.mark.timeout(1800)
"""Each try has its own, shorter limit, and beside other work many of them take long."""

_SLOW = ("load", "embed", "cli-embed")
"""Seconds each; the others are surveys, since they take longer, or have the same code as these."""
_ALWAYS = ("open", "read", "stat", "thread", "interrupt")
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


def _try(name: str, models: Path, most: int) -> None:
    """Try at most this many events of each kind.

    Faults of the caller's own thread must come. Others may not: in one call agents do more than in the next.
    """
    found = untouched(OPERATIONS[name], models)
    broken: dict[str, str] = {}
    tried: dict[str, int] = {}
    for kind in KINDS:
        cell = Cell(operation=name, kind=kind)
        deque(walk(cell, models, found, some_points(kind, found, most)), 0)
        broken |= cell.failures
        tried[kind] = cell.tried
    assert not broken
    assert all(tried[kind] for kind in _ALWAYS), tried


@pytest.mark.parametrize("name", ["run", slow("generate")])
def test_the_first_the_middle_and_the_last_event_of_each_kind(models: Path, name: str) -> None:
    _try(name, models, 3)


@pytest.mark.parametrize("name", [(slow if name in _SLOW else survey)(name) for name in OPERATIONS])
def test_events_of_each_kind(models: Path, name: str) -> None:
    _try(name, models, _FEW_POINTS if OPERATIONS[name].slow else _SLOW_POINTS)


@pytest.mark.parametrize(
    ("kind", "planted", "told"),
    [
        ("read", "an answer is wrong", "an answer is wrong"),
        ("allocation", "a buffer is lost", "buffers were not given back"),
    ],
)
def test_a_broken_promise_is_found(
    models: Path, monkeypatch: pytest.MonkeyPatch, kind: str, planted: str, told: str
) -> None:
    operation = OPERATIONS["run"]
    answer = untouched(operation, models).answer
    _plant(planted, monkeypatch)
    result = attempt(operation, Injector(kind=kind, fault=FAULTS[kind][0], at=4), models, answer)
    assert any(told in failure for failure in result.failures), result


def _plant(planted: str, patch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    match planted:
        case "an answer is wrong":
            patch.setattr("pipeload.model.to_array", lambda value: to_array(value) + 1)
        case _:
            patch.setattr(Buffer, "close", lambda buffer: kept.append(buffer))
