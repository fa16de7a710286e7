"""A call that is late ends with one error, as an interrupted one does, and disturbs no other caller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import Background, Clock, Gate, assert_same, run_sequentially, smallest_budget
from tests.engine.model.loading import THREADS, gated_reads, load

import pipeload
from pipeload.pipeline import deadlines

_PROMPT = [5, 6, 7, 8]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(deadlines, "time", made)
    return made


def _late(call: Callable[[], object], seconds: float = 0.01) -> pipeload.DeadlineError:
    """The error of a call that cannot be done in time."""
    with pytest.raises(pipeload.DeadlineError, match=f"The deadline of {seconds:g} s passed") as caught:
        with pipeload.deadline(seconds):
            call()
    assert isinstance(caught.value, pipeload.PipeloadError)
    assert isinstance(caught.value, TimeoutError)
    return caught.value


def test_a_call_whose_shard_does_not_come_is_late_and_the_next_one_answers(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = gated_reads(monkeypatch, at="block.001")
    with load(toy, smallest_budget(toy)) as model:
        gate.wait_reached()
        _late(lambda: model.run(toys.inputs()))
        _late(lambda: next(model.run_many([toys.inputs()] * 3)))
        gate.open()
        assert_same(model.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=THREADS))
        assert model.stats.passes == 1
    assert model._pipeline._memory.occupied_bytes == 0


def test_a_call_that_waits_behind_another_one_is_late_and_hinders_it_not(toy: Path) -> None:
    gate = Gate()
    with load(toy, smallest_budget(toy), progress=lambda _: gate.stop_here()) as model:
        first = Background(model.run, toys.inputs())
        gate.wait_reached()
        assert "while a pass waited behind other calls" in str(_late(lambda: model.run(toys.inputs())))
        assert "while the model changed its plan" in str(_late(lambda: model.set_budget("8GB")))
        gate.open()
        assert_same(first.end(), run_sequentially(toy, toys.inputs(), threads=THREADS))
        assert model.stats.passes == 1


def test_a_text_that_is_late_between_two_passes_takes_no_other_one(exported_gpt2: Path, clock: Clock) -> None:
    told: list[int] = []

    def on_token(token: pipeload.NewToken) -> None:
        told.append(token.token_id)
        if len(told) == 3:
            clock.now_s += 60

    options: dict[str, Any] = {"max_new_tokens": 6, "on_token": on_token}
    with load(exported_gpt2) as model:
        error = _late(lambda: model.generate(_PROMPT, **options), 60)
        assert "before a pass began" in str(error)
        assert model.stats.passes == len(told) == 3
        assert model._decoding.cache_bytes() == 0
        # The tokens are those that it would have had.
        assert model.generate(_PROMPT, max_new_tokens=6).token_ids[:3] == tuple(told)


def test_a_session_that_is_late_goes_on_from_the_tokens_that_it_has(exported_gpt2: Path, clock: Clock) -> None:
    def on_token(_: pipeload.NewToken) -> None:
        clock.now_s += 25

    with load(exported_gpt2) as model, model.session() as session:
        _late(lambda: session.generate(_PROMPT, max_new_tokens=6, on_token=on_token), 60)
        known = len(session.token_ids)
        assert known == len(_PROMPT) + 2
        found = session.generate(_PROMPT, max_new_tokens=6)
        assert found.token_ids == model.generate(_PROMPT, max_new_tokens=6).token_ids


def test_a_draft_that_is_late_is_no_failure_of_the_draft(
    exported_gpt2: Path, clock: Clock, recwarn: pytest.WarningsRecorder
) -> None:
    def on_token(_: pipeload.NewToken) -> None:
        clock.now_s += 60

    with load(exported_gpt2) as model, load(exported_gpt2) as draft:
        _late(lambda: model.generate(_PROMPT, max_new_tokens=40, on_token=on_token, assistant_model=draft), 60)
        assert not [one for one in recwarn if "without drafts" in str(one.message)]


def test_a_call_that_waits_for_memory_of_another_model_is_late(toy: Path) -> None:
    budget = pipeload.Budget("8GB")
    with load(toy, budget) as model, budget._moving:
        _late(lambda: budget.set("7GB"))
        _late(lambda: model.room_for(1000).__enter__())
    assert budget.budget_bytes == 8_000_000_000


def test_room_is_given_back_after_the_deadline_too(toy_large: Path, clock: Clock) -> None:
    with load(toy_large, smallest_budget(toy_large) + 20_000_000) as model:
        before = model.plan.process_bytes
        with pipeload.deadline(1), model.room_for(12 << 20, 1 << 20):
            clock.now_s += 2
        assert model.plan.process_bytes == before + (1 << 20)


def test_without_a_deadline_no_wait_has_an_end(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no clock is read: a call costs what it has always cost."""

    monkeypatch.setattr(deadlines, "time", None)
    with load(toy, smallest_budget(toy)) as model:
        model.run(toys.inputs())
