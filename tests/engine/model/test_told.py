"""The engine uses the caller's figures, and the figures that it reports and learns are true."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    run_sequentially,
    smallest_budget,
)
from tests.engine.model.loading import (
    THREADS,
    check_until_packed,
    fast_profile,
    load,
)

import pipeload
from pipeload.measuring import profile_store
from pipeload.planning.replanner import Replanner
from pipeload.tracing.trace import Progress


def test_a_profile_is_used_as_it_is(toy_large: Path) -> None:
    given = fast_profile(toy_large)
    with load(toy_large, smallest_budget(toy_large), profile=given) as model:
        plan = model.plan
        assert plan.steady_pass_s == pytest.approx(plan.streamed_bytes / 1e9, rel=0.2)
        assert plan.first_pass_s is not None
        assert model.profile.times == given.times
        # The process and the machine are always measured.
        assert model.profile.process_bytes > 10_000_000
        assert model.profile.cores < 99
        assert model.stats.peak_read_bytes_per_s == 1e9


@pytest.mark.measures("times")
def test_passes_teach_where_nothing_was_measured(toy_large: Path) -> None:
    with load(toy_large, smallest_budget(toy_large)) as model:
        assert not model.profile.measured
        assert model.plan.steady_pass_s is None
        model.run(toys.inputs())
        # It learns behind the answer, and before the next call.
        model.run(toys.inputs())
        assert model.profile.measured
        assert model.plan.steady_pass_s is not None
        assert set(model.profile.times) == {THREADS}


def _close(model: pipeload.Model) -> None:
    model.close()


def _tie(model: Any) -> None:
    model.itself = model


@pytest.mark.measures("times")
@pytest.mark.parametrize("end", [_close, _tie, lambda _: None], ids=["closed", "collected in a cycle", "forgotten"])
def test_what_passes_taught_is_kept_however_the_model_ends(
    toy: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[pipeload.Model], None]
) -> None:
    monkeypatch.setattr(Replanner, "learned", Replanner.profile)
    monkeypatch.chdir(toy.parent)
    model = load(Path(toy.name))
    monkeypatch.chdir("/")
    model.run(toys.inputs())
    model.run(toys.inputs())
    dims, learned = model._profile_dims, model.profile
    assert profile_store.find(toy, dims) is None
    end(model)
    del model
    gc.collect()
    kept = profile_store.find(toy, dims)
    assert kept is not None
    assert kept.measured
    assert set(kept.times) == set(learned.times)


@pytest.mark.measures("times")
def test_a_given_profile_is_not_kept(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replanner, "learned", Replanner.profile)
    with load(toy, profile=fast_profile(toy)) as model:
        model.run(toys.inputs())
        dims = model._profile_dims
    assert profile_store.find(toy, dims) is None


def test_statistics_tell_about_the_latest_pass(toy_large: Path) -> None:
    shape = toys.inputs()["input_ids"].shape
    sizes = {"batch_size": shape[0], "sequence_length": shape[1]}
    with load(toy_large, smallest_budget(toy_large), profile=fast_profile(toy_large), sizes=sizes) as model:
        assert model.stats.last is None
        for _ in range(3):
            model.run(toys.inputs())
        stats = model.stats
        last = stats.last
        assert last is not None
        assert (stats.passes, stats.last_pass_s) == (3, last.seconds)
        assert stats.budget_bytes == model.plan.budget_bytes
        assert 0 < last.read_bytes <= model.manifest.weight_bytes * 1.01
        assert 0 < last.read_s <= last.seconds
        assert last.bound_s is not None
        assert last.efficiency == pytest.approx(last.bound_s / last.seconds)
        inference = last.agents["inference"]
        assert inference.busy_s + inference.wait_s == pytest.approx(last.seconds)
        assert stats.read_bytes >= 3 * model.plan.streamed_bytes


def test_progress_is_told_and_its_errors_reach_the_caller(toy: Path) -> None:
    told: list[Progress] = []

    def note(progress: Progress) -> None:
        told.append(progress)
        if len(told) == 11:
            raise ValueError("mine")

    with load(toy, smallest_budget(toy), progress=note) as model:
        expected = run_sequentially(toy, toys.inputs(), threads=THREADS)
        check_until_packed(model, toys.inputs(), expected)
        assert [progress.index for progress in told] == list(range(1, 9))
        assert told[-1].eta_s == pytest.approx(0)
        with pytest.raises(ValueError, match="mine"):
            model.run(toys.inputs())
        check_until_packed(model, toys.inputs(), expected)
        assert model.stats.passes == 2
