"""Several models under one budget: each can always run, the one that is called has the rest, and none is ever over."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    PATIENCE_S,
    Background,
    Gate,
    assert_same,
    figures_of_memory,
    run_sequentially,
    smallest_budget,
)
from tests.engine.model.loading import THREADS, fast_profile, load, no_subprocess
from tests.engine.still_machine import PROCESS_BYTES

import pipeload
from pipeload import opening

_RUNTIME_BYTES = 18_000_000
_SPARE = 24_000_000
"""Room for some of the blocks of one model."""
_AMPLE = 400_000_000


def least_for_both(directory: Path, other: Path) -> int:
    """The smallest budget that the refusal of the second model names."""
    budget = pipeload.Budget(smallest_budget(directory))
    with load(directory, budget), pytest.raises(pipeload.BudgetError, match="2 models together") as caught:
        load(other, budget)
    assert caught.value.budget_bytes == budget.budget_bytes
    assert str(caught.value.needed_bytes) in str(caught.value)
    return caught.value.needed_bytes


@contextmanager
def opened(budget: pipeload.Budget, *directories: Path, **options: Any) -> Iterator[list[pipeload.Model]]:
    with ExitStack() as stack:
        yield [stack.enter_context(load(each, budget, profile=fast_profile(each), **options)) for each in directories]


def assert_within(budget: pipeload.Budget, *models: pipeload.Model) -> None:
    """What all plans use together, and what all weights occupy, is below the budget."""
    assert budget.budget_bytes is not None
    process = max(model.profile.process_bytes for model in models) + _RUNTIME_BYTES
    assert process + sum(model.plan.peak_bytes - model.plan.process_bytes for model in models) <= budget.budget_bytes
    for model in models:
        assert model.plan.peak_bytes <= budget.budget_bytes
        assert model._pipeline._memory.occupied_bytes <= model.plan.weights_bytes


def held_bytes(model: pipeload.Model) -> int:
    return model.plan.resident_bytes


def settled(model: pipeload.Model) -> pipeload.Model:
    """The model, when it has done what other callers have asked it for."""
    model._pipeline.change(nullcontext).result()
    return model


def run(model: pipeload.Model, batch: int = 2, length: int = 5) -> None:
    """A pass with the right answer."""
    assert_same(model.run(toys.inputs(batch, length)), expected_of(model.directory, batch, length))


@cache
def expected_of(directory: Path, batch: int = 2, length: int = 5) -> Any:
    return run_sequentially(directory, toys.inputs(batch, length), threads=THREADS)


def test_the_smallest_budget_of_both_runs_both(toy_large: Path, toy: Path) -> None:
    budget = pipeload.Budget(least_for_both(toy_large, toy))
    with opened(budget, toy_large, toy) as models:
        for _ in range(3):
            for model in models:
                run(model)
                assert_within(budget, *models)


def test_a_refused_model_leaves_the_others_as_they_are(toy_large: Path) -> None:
    budget = pipeload.Budget(smallest_budget(toy_large))
    with load(toy_large, budget) as model:
        run(model)
        layout = model.plan.layout
        with pytest.raises(pipeload.BudgetError):
            load(toy_large, budget)
        run(model)
        assert model.plan.layout == layout


def test_a_model_that_is_called_alone_keeps_all_memory(toy_large: Path) -> None:
    budget = pipeload.Budget(least_for_both(toy_large, toy_large) + _SPARE)
    with opened(budget, toy_large, toy_large) as (first, other):
        for _ in range(3):
            run(first)
        layout, read_bytes = first.plan.layout, []
        for _ in range(4):
            before = first.stats.read_bytes
            run(first)
            read_bytes.append(first.stats.read_bytes - before)
        assert first.plan.layout == layout
        assert held_bytes(first) > 4 * held_bytes(other)
        assert_within(budget, first, other)


def test_memory_moves_at_the_second_pass_in_a_row(toy_large: Path) -> None:
    budget = pipeload.Budget(least_for_both(toy_large, toy_large) + _SPARE)
    with opened(budget, toy_large, toy_large) as (first, other):
        for _ in range(3):
            run(first)
        held, little = held_bytes(first), held_bytes(other)
        assert held > 4 * little
        run(other)
        assert (held_bytes(settled(first)), held_bytes(other)) == (held, little)
        run(other)
        assert held_bytes(settled(first)) == little
        assert held_bytes(other) >= held
        assert_within(budget, first, other)


def test_models_that_are_called_in_turn_move_no_memory(toy_large: Path) -> None:
    budget = pipeload.Budget(least_for_both(toy_large, toy_large) + _SPARE)
    with opened(budget, toy_large, toy_large) as (first, other):
        for _ in range(3):
            run(first)
        layouts = []
        for _ in range(6):
            run(other)
            run(first)
            layouts.append((first.plan.layout, other.plan.layout))
            assert_within(budget, first, other)
        assert len(set(map(repr, layouts))) == 1
        assert held_bytes(first) > 4 * held_bytes(other)


def test_where_all_fit_none_gives_anything(toy_large: Path) -> None:
    budget = pipeload.Budget(PROCESS_BYTES + _AMPLE)
    with opened(budget, toy_large, toy_large, toy_large) as models:
        for _ in range(3):
            for model in models:
                run(model)
                run(model)
        assert [model.plan.streamed_bytes for model in models] == [0, 0, 0]
        assert_within(budget, *models)


def test_a_pass_that_runs_is_let_be(toy_large: Path) -> None:
    gate = Gate(opened=True)
    budget = pipeload.Budget(least_for_both(toy_large, toy_large) + _SPARE)
    with ExitStack() as stack:
        first = stack.enter_context(
            load(toy_large, budget, profile=fast_profile(toy_large), progress=lambda _: gate.stop_here())
        )
        (other,) = stack.enter_context(opened(budget, toy_large))
        for _ in range(3):
            run(first)
        held, little = first.plan, held_bytes(other)
        gate.__init__()  # type: ignore[misc]
        call = Background(lambda: run(first))
        gate.wait_reached()
        for _ in range(3):
            # Beside a pass that runs, the other model does with its least.
            run(other)
            assert first.plan == held
            assert held_bytes(other) == little
        gate.open()
        call.end()
        assert held_bytes(settled(first)) == little
        run(other)
        assert held_bytes(other) >= held.resident_bytes
        assert_within(budget, first, other)


def test_larger_inputs_take_what_they_lack_from_the_others(toy_large: Path) -> None:
    budget = pipeload.Budget(least_for_both(toy_large, toy_large) + _SPARE)
    with opened(budget, toy_large, toy_large) as (first, other):
        for _ in range(3):
            run(first)
        held = first.plan.layout
        with pytest.raises(pipeload.BudgetError, match="2 models together") as caught:
            other.run(toys.inputs(16, 128))
        assert first.plan.layout == held
        run(other, 4, 64)
        assert first.plan.layout != held
        assert_within(budget, first, other)
        (together,) = other.run_many([toys.inputs(4, 96)])
        assert_same(together, expected_of(toy_large, 4, 96))
        assert_within(budget, first, other)
        budget.set(caught.value.needed_bytes)
        other.run(toys.inputs(16, 128))
        assert_within(budget, first, other)


def wait_until(holds: Callable[[], object]) -> bool:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline_s:
            return False
    return True


def test_memory_on_its_way_to_a_model_is_waited_for(toy_large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that gives it has it no more, and the one that has asked for it not yet: that is no refusal."""
    busy, giving, waiting = Gate(), Gate(), Gate()

    @contextmanager
    def held_by(gate: Gate) -> Iterator[None]:
        gate.stop_here()
        yield

    with opened(pipeload.Budget(least_for_both(toy_large, toy_large) + _SPARE), toy_large, toy_large) as (first, other):
        for _ in range(3):
            run(first)
        run(other)
        calls = [
            one._pipeline.change(lambda gate=gate: held_by(gate)) for one, gate in ((first, busy), (other, waiting))
        ]
        prepare = first._pipeline._room.prepare

        def given_back(*arguments: Any, **options: Any) -> None:
            if first._pipeline.share.usable_bytes is not None:
                giving.stop_here()
            prepare(*arguments, **options)

        monkeypatch.setattr(first._pipeline._room, "prepare", given_back)
        larger = Background(lambda: run(other, 4, 64))
        waiting.wait_reached()
        queue = first._pipeline._exchange.calls
        assert wait_until(lambda: queue._waiting), "it was not asked for memory"
        busy.open()
        giving.wait_reached()
        waiting.open()
        assert wait_until(lambda: queue._waiting or not larger.is_alive())
        giving.open()
        larger.end()
        for call in calls:
            call.result()


def test_a_closed_model_leaves_its_memory_to_the_others(toy_large: Path) -> None:
    budget = pipeload.Budget(least_for_both(toy_large, toy_large) + _SPARE)
    with load(toy_large, budget.budget_bytes, profile=fast_profile(toy_large)) as alone:
        run(alone)
        resident = len(alone.plan.resident)
    with opened(budget, toy_large) as (other,):
        with load(toy_large, budget, profile=fast_profile(toy_large)) as first:
            for _ in range(3):
                run(first)
            assert len(other.plan.resident) < resident
        run(other)
        assert len(other.plan.resident) == resident
        # A model that was dropped, too.
        first = load(toy_large, budget, profile=fast_profile(toy_large))
        run(first)
        run(first)
        del first
        gc.collect()
        run(other)
        assert len(other.plan.resident) == resident
        assert repr(budget).endswith("1 models open>")


def test_a_budget_may_be_set(toy_large: Path) -> None:
    least = least_for_both(toy_large, toy_large)
    budget = pipeload.Budget(PROCESS_BYTES + _AMPLE)
    with opened(budget, toy_large, toy_large) as models:
        budget.set(least + _SPARE)
        assert budget.budget_bytes == least + _SPARE
        assert_within(budget, *models)
        with pytest.raises(pipeload.BudgetError, match="2 models together"):
            budget.set(PROCESS_BYTES + _RUNTIME_BYTES + 2_000_000)
        with pytest.raises(pipeload.ConfigError):
            budget.set("much")
        assert budget.budget_bytes == least + _SPARE
        for model in models:
            run(model)
            assert_within(budget, *models)
        models[0].set_budget(PROCESS_BYTES + _AMPLE)
        for model in models * 2:
            run(model)
        assert [model.plan.streamed_bytes for model in models] == [0, 0]
        assert_within(budget, *models)


def test_callers_of_several_models_at_once_get_their_answers(toy_large: Path, toy: Path) -> None:
    budget = pipeload.Budget(least_for_both(toy_large, toy_large) + _SPARE)
    expected = expected_of(toy_large)
    over: list[int] = []

    with opened(budget, toy_large, toy_large, toy) as models:

        def look(_: object) -> None:
            occupied = sum(model._pipeline._memory.occupied_bytes for model in models)
            over.append(PROCESS_BYTES + _RUNTIME_BYTES + occupied - (budget.budget_bytes or 0))

        for model in models:
            model._pipeline._progress = look

        def call(place: int) -> None:
            for number in range(12):
                model = models[(place + number // (1 + place)) % 2]
                assert_same(model.run(toys.inputs()), expected)

        callers = [Background(lambda place=place: call(place)) for place in range(3)]  # type: ignore[misc]
        for caller in callers:
            caller.end()
        assert_within(budget, *map(settled, models))
    assert max(over) <= 0


def test_a_progress_callback_that_calls_another_model_waits_for_no_pass(toy_large: Path) -> None:
    budget = pipeload.Budget(least_for_both(toy_large, toy_large) + _SPARE)
    seen: list[BaseException] = []

    with opened(budget, toy_large) as (other,):

        def call(_: object) -> None:
            try:
                run(other)
            except pipeload.PipeloadError as error:
                seen.append(error)

        with load(toy_large, budget, profile=fast_profile(toy_large), progress=call) as first:
            run(first)
    assert not seen


def test_a_forked_child_begins_with_an_empty_budget(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = pipeload.Budget("2GB")
    with load(toy, budget):
        assert repr(budget).endswith("1 models open>")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            budget.process_bytes(1, 0)
        assert repr(budget).endswith("0 models open>")


@pytest.mark.parametrize("moment", ["before it asks", "while it asks"])
def test_a_model_opens_while_the_other_is_being_closed(toy: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The other's memory was counted as taken when the plan was refused, and is free when that is looked at."""
    budget = pipeload.Budget(smallest_budget(toy))
    other = load(toy, budget)
    if moment == "while it asks":
        real = budget.gather
        monkeypatch.setattr(budget, "gather", lambda *asked: (other.close(), real(*asked))[1])
    else:
        first = opening._first_plan

        def closing(*arguments: Any) -> Any:
            try:
                return first(*arguments)
            except pipeload.BudgetError:
                other.close()
                raise

        monkeypatch.setattr(opening, "_first_plan", closing)
    with load(toy, budget) as model:
        assert_same(model.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=THREADS))


class _SlowClose:
    """The closing of a model that has begun, and ends when the test says so."""

    def __init__(self, model: pipeload.Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self._gate, room = Gate(), model._pipeline._room
        real = room.stop
        monkeypatch.setattr(room, "stop", lambda: (self._gate.stop_here(), real())[1])
        self._call = Background(model.close)
        self._gate.wait_reached()

    def end(self) -> None:
        self._gate.open()
        self._call.end()

    def end_when_waited_for(self, budget: pipeload.Budget, monkeypatch: pytest.MonkeyPatch) -> None:
        """End when the budget begins to wait for models that are being closed."""
        real = budget._wait_for_closing
        monkeypatch.setattr(budget, "_wait_for_closing", lambda: (self._gate.open(), real())[1])


def test_a_model_that_opens_waits_for_one_that_is_being_closed(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = pipeload.Budget(smallest_budget(toy))
    closing = _SlowClose(load(toy, budget), monkeypatch)
    closing.end_when_waited_for(budget, monkeypatch)
    with load(toy, budget) as model:
        assert_same(model.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=THREADS))
    closing.end()


def test_a_budget_is_set_while_a_model_is_being_closed(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, smallest = pipeload.Budget(_AMPLE), smallest_budget(toy)
    other, model = load(toy, budget), load(toy, budget)
    # The one that has the rest.
    holder, stays = (other, model) if budget._shares.holder is other._pipeline.share else (model, other)
    closing = _SlowClose(holder, monkeypatch)
    closing.end_when_waited_for(budget, monkeypatch)
    with stays:
        budget.set(smallest)
        assert stays.plan.budget_bytes == smallest
        assert_same(stays.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=THREADS))
    closing.end()


def test_room_beside_a_model_is_made_while_another_is_being_closed(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = pipeload.Budget(_AMPLE)
    other, model = load(toy, budget), load(toy, budget)
    holder, stays = (other, model) if budget._shares.holder is other._pipeline.share else (model, other)
    closing = _SlowClose(holder, monkeypatch)
    closing.end_when_waited_for(budget, monkeypatch)
    with stays, stays.room_for(_SPARE):
        assert_same(stays.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=THREADS))
    closing.end()


@no_subprocess
def test_a_process_with_two_models_never_occupied_more_than_its_budget(toy_large: Path) -> None:
    program = f"""
import pipeload
from tests.engine import toy

def refused(*directories):
    try:
        pipeload.load(*directories)
    except pipeload.BudgetError as error:
        return error.needed_bytes
directory = {str(toy_large)!r}
budget = pipeload.Budget(refused(directory, 1))
with pipeload.load(directory, budget) as model:
    model.run(toy.inputs(1, 64))
    budget.set(refused(directory, budget) + 36_000_000)
    with pipeload.load(directory, budget) as other:
        for passes in (1, 2, 4, 1, 1, 1):
            for one in (model, other):
                for _ in range(passes):
                    one.run(toy.inputs(1, 64))
        assert max(one.plan.resident_bytes for one in (model, other)) > 4_000_000
        print(other.stats.peak_bytes - budget.budget_bytes)
"""
    [beyond_bytes] = figures_of_memory(program)
    assert beyond_bytes <= 0
