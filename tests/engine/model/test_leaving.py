"""A caller that leaves, by another thread, gives up its place before the next sweep, and disturbs no other caller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import Background, Gate, assert_same, run_sequentially, smallest_budget
from tests.engine.model.loading import THREADS, load

import pipeload
from pipeload.pipeline.callers import Caller


class _Gated:
    """A model whose first pass stops after its first shard."""

    def __init__(self, directory: Path) -> None:
        self.gate = Gate()
        self.model = load(directory, smallest_budget(directory) + 1_000_000, progress=self._shard_ran)

    def _shard_ran(self, progress: pipeload.Progress) -> None:
        if progress.index == 1:
            self.gate.stop_here()


def _as(caller: Caller, model: pipeload.Model) -> Any:
    with caller:
        return model.run(toys.inputs())


def _left(background: Background) -> None:
    error = background.wait()
    assert isinstance(error, pipeload.ClosedError)
    assert "caller has left" in str(error)


def test_a_caller_that_waits_takes_no_part_in_the_next_sweep(toy: Path) -> None:
    gated, caller = _Gated(toy), Caller()
    with gated.model as model:
        first = Background(model.run, toys.inputs())
        gated.gate.wait_reached()
        second = Background(_as, caller, model)
        third = Background(model.run, toys.inputs(2, 3))
        calls = model._pipeline._exchange.calls
        with calls._changed:
            assert calls._changed.wait_for(lambda: len(calls._waiting) == 2, 60)
        caller.leave()
        _left(second)
        gated.gate.open()
        assert_same(first.end(), run_sequentially(toy, toys.inputs(), threads=THREADS))
        assert_same(third.end(), run_sequentially(toy, toys.inputs(2, 3), threads=THREADS))
        assert model.stats.passes == 2
        assert model.stats.last is not None
        assert model.stats.last.calls == 1


def test_a_caller_that_is_served_ends_at_the_next_shard(toy: Path) -> None:
    gated, caller = _Gated(toy), Caller()
    with gated.model as model:
        first = Background(_as, caller, model)
        gated.gate.wait_reached()
        caller.leave()
        _left(first)
        gated.gate.open()
        assert_same(model.run(toys.inputs()), run_sequentially(toy, toys.inputs(), threads=THREADS))
        assert model.stats.passes == 1


def test_a_caller_that_has_left_begins_no_call(toy: Path) -> None:
    caller = Caller()
    caller.leave()
    with load(toy, smallest_budget(toy)) as model, pytest.raises(pipeload.ClosedError, match="caller has left"):
        _as(caller, model)
    assert model.stats.passes == 0


def test_a_model_that_closes_ends_callers_that_have_left_too(toy: Path) -> None:
    gated, caller = _Gated(toy), Caller()
    with gated.model as model:
        first = Background(_as, caller, model)
        gated.gate.wait_reached()
        caller.leave()
        gated.gate.open()
        model.close()
    _left(first)
