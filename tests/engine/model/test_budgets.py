"""The process occupies no more than its budget; one that cannot work is refused with the smallest that does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    EMULATED,
    agents,
    assert_same,
    figures_of_memory,
    run_sequentially,
    smallest_budget,
)
from tests.engine.model.loading import (
    PLENTY,
    THREADS,
    budget_kinds,
    fast_profile,
    load,
    no_subprocess,
)
from tests.marks import slow

import pipeload
from pipeload.machine.memory import rss_bytes
from pipeload.storage.weights import Storage


def test_too_small_a_budget_is_refused_before_anything_is_read(
    toy_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        pytest.fail("something was read")

    with monkeypatch.context() as patch:
        for name in ("graph", "read_weights", "read_rows"):
            patch.setattr(Storage, name, read)
        with pytest.raises(pipeload.BudgetError) as caught:
            pipeload.load(toy_large, "30MB")
        assert agents() == []
    message, needed = str(caught.value), caught.value.needed_bytes
    assert "'block.000' with 4.2 MB" in message
    assert str(needed) in message
    assert caught.value.budget_bytes == 30_000_000
    with load(toy_large, needed) as model:
        assert model.plan.peak_bytes <= needed
        assert_same(model.run(toys.inputs()), run_sequentially(toy_large, toys.inputs(), threads=THREADS))


@pytest.mark.skipif(EMULATED, reason="three minutes under qemu, and no other code runs there")
def test_larger_inputs_make_resident_shards_leave(toy_large: Path) -> None:
    budget = smallest_budget(toy_large) + 33_000_000
    with load(toy_large, budget) as model:
        assert len(model.plan.resident) >= 3
        seen = [len(model.plan.resident)]
        for batch in (1, 2, 4):
            inputs = toys.inputs(batch, 128)
            assert_same(model.run(inputs), run_sequentially(toy_large, inputs, threads=THREADS))
            assert model.plan.peak_bytes <= budget
            seen.append(len(model.plan.resident))
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] < seen[0]


def test_inputs_that_are_too_large_are_refused_and_smaller_ones_work(toy_large: Path) -> None:
    with load(toy_large, smallest_budget(toy_large)) as model:
        model.run(toys.inputs(1, 8))
        with pytest.raises(pipeload.BudgetError, match="pass smaller inputs") as caught:
            model.run(toys.inputs(64, 512))
        assert_same(model.run(toys.inputs(1, 8)), run_sequentially(toy_large, toys.inputs(1, 8), threads=THREADS))
    with load(toy_large, caught.value.needed_bytes, sizes={"batch_size": 64, "sequence_length": 512}) as model:
        assert model.plan.peak_bytes <= caught.value.needed_bytes


def test_planned_sizes_are_counted(toy_large: Path) -> None:
    small = smallest_budget(toy_large)
    assert smallest_budget(toy_large, sizes={"batch_size": 64}) > small + 64 * 128 * 1024 * 4


@pytest.mark.measures("memory")
def test_a_streamed_model_occupies_no_more_than_its_budget(toy_large: Path) -> None:
    budget = smallest_budget(toy_large)
    with load(toy_large, budget) as model:
        for _ in range(5):
            model.run(toys.inputs(1, 32))
            assert rss_bytes() <= budget
        assert model.plan.streamed_bytes > 0


@no_subprocess
@pytest.mark.parametrize("more", [0, slow(8_000_000), slow(20_000_000), slow(45_000_000), slow(80_000_000)])
def test_a_process_never_occupied_more_than_its_budget(toy_large: Path, more: int) -> None:
    """The peak of a process of its own, over streaming, partly resident shards, re-planning and packing."""
    program = f"""
import pipeload
from tests.engine import toy
try:
    pipeload.load({str(toy_large)!r}, 1)
except pipeload.BudgetError as error:
    budget = error.needed_bytes + {more}
with pipeload.load({str(toy_large)!r}, budget) as model:
    for _ in range(8):
        model.run(toy.inputs(1, 64))
    assert model.stats.budget_bytes <= budget
    print(model.stats.peak_bytes - budget)
"""
    [beyond_bytes] = figures_of_memory(program)
    assert beyond_bytes <= 0


@pytest.mark.slow
def test_a_budget_may_be_set_at_any_time(toy_large: Path) -> None:
    expected = run_sequentially(toy_large, toys.inputs(), threads=THREADS)
    budgets = budget_kinds(toy_large)
    tight, roomy = budgets["1 buffers, some resident"], budgets["all resident"]
    with load(toy_large, roomy, profile=fast_profile(toy_large)) as model:
        assert_same(model.run(toys.inputs()), expected)
        model.set_budget(tight)
        assert model.plan.peak_bytes <= model.plan.budget_bytes == tight
        assert model.plan.streamed_bytes > 0
        assert_same(model.run(toys.inputs()), expected)
        model.set_budget(f"{roomy // 1000}kB")
        assert_same(model.run(toys.inputs()), expected)
        assert not model.plan.streamed_bytes
        model.set_budget("auto")
        assert model.plan.budget_bytes > roomy
        with pytest.raises(pipeload.BudgetError):
            model.set_budget(1)
        for wrong in ("much", 0, -5):
            with pytest.raises(pipeload.ConfigError):
                model.set_budget(wrong)
        assert model.plan.budget_bytes > roomy
    with pytest.raises(pipeload.ClosedError):
        model.set_budget(tight)


@pytest.mark.skipif(EMULATED, reason="RSS counts what the emulator holds")
@pytest.mark.parametrize("packed", [False, True], ids=["streamed", "packed"])
def test_a_closed_model_gives_its_memory_back(toy_large: Path, packed: bool) -> None:
    with load(toy_large, PLENTY if packed else smallest_budget(toy_large) + 10_000_000) as model:
        model.run(toys.inputs())
        plan = model.plan
        assert plan.packed is packed
        exchange = model._pipeline._exchange
        if not packed:
            # The shards read ahead for the next pass are there.
            with exchange._changed:
                assert exchange._changed.wait_for(lambda: len(exchange._ready) == plan.buffers, 30)
        held = rss_bytes()
    # The model is closed, and still referred to.
    weights = plan.buffers * plan.buffer_bytes if plan.streamed_bytes else model.manifest.weight_bytes
    assert held - rss_bytes() > 0.8 * weights
