"""Many inputs give the answers that each gives alone, are taken as they are needed, and may be left at any time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    PATIENCE_S,
    Background,
    assert_close,
    assert_same,
    run_sequentially,
    smallest_budget,
)
from tests.engine.model.loading import (
    THREADS,
    gated_reads,
    load,
)

import pipeload
from pipeload.tracing.trace import Progress

_MIXED = [(1, 5), (1, 5), (2, 5), (1, 7), (1, 7), (1, 5), (3, 5)]


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_many_inputs_give_what_each_would_give_alone(toy: Path, batch: int) -> None:
    items = [toys.inputs(rows, length, seed=k) for k, (rows, length) in enumerate(_MIXED)]
    with load(toy, smallest_budget(toy)) as model:
        results = list(model.run_many(items, batch=batch))
        assert len(results) == len(items)
        for item, result in zip(items, results, strict=True):
            # A batch is another shape of the matrices, whose kernels may sum in another order.
            assert_close(result, run_sequentially(toy, item, threads=THREADS), 1e-5)
        # A batch that waits may share the sweep of another one.
        assert 2 <= model.stats.passes <= {1: 7, 2: 4, 3: 3, 100: 3}[batch]


def test_many_inputs_without_batches_are_bit_for_bit(toy: Path) -> None:
    items = [toys.inputs(1, 5, seed=seed) for seed in range(4)]
    with load(toy, smallest_budget(toy)) as model:
        results = list(model.run_many(items))
        if not any(span.kind == "pack" for span in model.trace.spans):
            for item, result in zip(items, results, strict=True):
                assert_same(result, run_sequentially(toy, item, threads=THREADS))


def test_no_inputs_give_no_outputs(toy: Path) -> None:
    with load(toy) as model:
        assert list(model.run_many([])) == []
        with pytest.raises(pipeload.ConfigError, match="batch is 0"):
            list(model.run_many([], batch=0))


@pytest.mark.parametrize("batch", [1, 3])
def test_endless_inputs_are_taken_as_they_are_needed(toy: Path, batch: int) -> None:
    taken = []

    def items() -> Iterator[dict[str, Any]]:
        for number in count():
            taken.append(number)
            yield toys.inputs(1, 5, seed=number)

    with load(toy, smallest_budget(toy)) as model:
        outputs = model.run_many(items(), batch=batch)
        assert taken == []
        for number, _ in enumerate(islice(outputs, 9), start=1):
            # The batch whose answer this is, and the one that is queued behind it.
            assert len(taken) <= (-(-number // batch) + 1) * batch
        outputs.close()
        assert model._pipeline._exchange.calls.idle or Background(model.run, toys.inputs()).wait() is None


def test_giving_up_early_leaves_nothing_running(toy: Path) -> None:
    with load(toy, smallest_budget(toy)) as model:
        outputs = model.run_many(toys.inputs(seed=seed) for seed in count())
        next(outputs)
        outputs.close()
        # The call that was queued was withdrawn: whatever comes next is served at once.
        model.run(toys.inputs())
        assert model._pipeline._exchange.calls.idle or not model._pipeline._exchange.calls._waiting
        assert model.stats.passes <= 3


@pytest.mark.parametrize("batch", [1, 2])
def test_a_faulty_item_is_named_and_the_others_before_it_are_answered(toy: Path, batch: int) -> None:
    good, bad = toys.inputs(1, 5), {"input_ids": np.zeros((1, 5), np.int32)}
    with load(toy, smallest_budget(toy)) as model:
        outputs = model.run_many([good, good, good, bad, good], batch=batch)
        next(outputs)
        with pytest.raises(pipeload.ConfigError, match="'attention_mask' is missing"):
            list(outputs)
        assert next(outputs, None) is None
        model.run(good)


def test_an_error_of_the_iterable_reaches_the_caller(toy: Path) -> None:
    def items() -> Iterator[dict[str, Any]]:
        yield toys.inputs()
        raise OSError("mine")

    with load(toy, smallest_budget(toy)) as model:
        with pytest.raises(OSError, match="mine"):
            list(model.run_many(items()))
        model.run(toys.inputs())


def test_closing_ends_many_inputs(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gated_reads(monkeypatch, "block.003")
    model = load(toy, smallest_budget(toy))
    call = Background(list, model.run_many(toys.inputs(seed=seed) for seed in count()))
    gate.wait_reached()
    closing = Background(model.close)
    assert isinstance(call.wait(), pipeload.ClosedError)
    gate.open()
    closing.end()


@pytest.mark.slow
@pytest.mark.parametrize("kept_before", [False, True], ids=["nothing kept", "outputs kept"])
def test_the_budget_that_the_first_batch_names_holds_for_all_later_ones(toy_large: Path, kept_before: bool) -> None:
    """A caller has a batch's outputs while the next batch runs, and until it takes those of the next one."""

    def needed(budget: int) -> int | None:
        made = threading.Semaphore(0)

        def count(progress: Progress) -> None:
            if progress.index == progress.count:
                made.release()

        with load(toy_large, budget, progress=count) as model:
            kept = model.run(toys.inputs(1, 64)) if kept_before else None
            items = [toys.inputs(2, 256, seed=seed) for seed in range(8)]
            seen = -1 if kept_before else 0
            try:
                for number, outputs in enumerate(model.run_many(items)):
                    # The slowest caller: all that is queued has run before it asks for more.
                    while seen < min(number + 2, len(items)):
                        assert made.acquire(timeout=PATIENCE_S)
                        seen += 1
                    held = outputs
                del held
            except pipeload.BudgetError as error:
                return error.needed_bytes
            finally:
                del kept
        return None

    named = needed(smallest_budget(toy_large) + 2_000_000)
    assert named is not None
    assert needed(named) is None
