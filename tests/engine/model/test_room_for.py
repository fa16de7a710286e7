"""`Model.room_for`: weights give way before the caller's own memory grows."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine import toy as toys
from tests.engine.harness import assert_same, run_sequentially, smallest_budget
from tests.engine.model.loading import THREADS, load

import pipeload

_MOST_BYTES, _KEPT_BYTES = 12 << 20, 4 << 20


def test_weights_give_way_and_the_plan_knows_what_is_kept(toy_large: Path) -> None:
    budget = smallest_budget(toy_large) + 20_000_000
    expected = run_sequentially(toy_large, toys.inputs(), threads=THREADS)
    with load(toy_large, budget) as model:
        before = model.plan
        with model.room_for(_MOST_BYTES, _KEPT_BYTES):
            within = model.plan
            assert_same(model.run(toys.inputs()), expected)
        after = model.plan
        assert_same(model.run(toys.inputs()), expected)
    assert before.budget_bytes == within.budget_bytes == after.budget_bytes
    assert within.weights_bytes <= before.weights_bytes - _MOST_BYTES
    # Weights that had to leave come back later, if ever: the plan only has to know of the room.
    assert after.peak_bytes == within.peak_bytes - _MOST_BYTES + _KEPT_BYTES
    assert after.process_bytes == before.process_bytes + _KEPT_BYTES


def test_room_that_cannot_be_made_is_refused_and_changes_nothing(toy_large: Path) -> None:
    budget = smallest_budget(toy_large) + 5_000_000
    with load(toy_large, budget) as model:
        before = model.plan.resident
        with pytest.raises(pipeload.BudgetError, match="the smallest that can"):
            with model.room_for(_MOST_BYTES):
                pytest.fail("there was no room")
        assert model.plan.resident == before
        assert_same(model.run(toys.inputs()), run_sequentially(toy_large, toys.inputs(), threads=THREADS))


def test_a_body_that_fails_keeps_nothing(toy_large: Path) -> None:
    with load(toy_large, smallest_budget(toy_large) + 20_000_000) as model:
        before = model.plan.process_bytes
        with pytest.raises(ZeroDivisionError), model.room_for(_MOST_BYTES, _KEPT_BYTES):
            raise ZeroDivisionError
        assert model.plan.process_bytes == before


def test_a_model_that_is_closed_meanwhile_raises_nothing_more(toy_large: Path) -> None:
    with load(toy_large, smallest_budget(toy_large) + 20_000_000) as model:
        with model.room_for(_MOST_BYTES):
            model.close()
        with pytest.raises(pipeload.ClosedError), model.room_for(_MOST_BYTES):
            pass
