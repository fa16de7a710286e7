"""The answers are those of the sequential and of the unsplit model, under every budget."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    assert_close,
    assert_same,
    run_sequentially,
    smallest_budget,
)
from tests.engine.model.loading import (
    PLENTY,
    THREADS,
    budget_kinds,
    check_until_packed,
    load,
)
from tests.models import REFERENCE_NAME


def _reference(directory: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Inputs, and the unsplit model's outputs for them."""
    with np.load(directory / REFERENCE_NAME) as saved:
        for number in sorted({name.split(".")[1] for name in saved.files}):
            inputs, outputs = (
                {name.split(".", 2)[2]: saved[name] for name in saved.files if name.startswith(f"{kind}.{number}.")}
                for kind in ("input", "output")
            )
            yield inputs, outputs


def test_exported_models_agree_with_the_sequential_and_the_unsplit_model(exported: Path) -> None:
    """Streamed: bit for bit the sequential one. Packed: within 1e-5. Any: within 1e-4 of the unsplit model."""
    kinds = budget_kinds(exported)
    assert {"packed", "all resident"} < kinds.keys()
    cases = [(inputs, run_sequentially(exported, inputs, threads=THREADS), out) for inputs, out in _reference(exported)]
    for kind, budget in kinds.items():
        with load(exported, budget) as model:
            for inputs, sequential, unsplit in cases:
                for _ in range(2):
                    outputs = model.run(inputs)
                    if kind == "packed" or model.plan.packed:
                        assert_close(outputs, sequential, 1e-5)
                    else:
                        assert_same(outputs, sequential)
                    assert_close(outputs, unsplit, 1e-4)


def test_toys_agree_with_the_sequential_model_under_every_budget(any_toy: Path) -> None:
    expected = run_sequentially(any_toy, toys.inputs(), threads=THREADS)
    kinds = budget_kinds(any_toy)
    assert len(kinds) >= 4
    for kind, budget in kinds.items():
        with load(any_toy, budget) as model:
            for _ in range(3):
                if kind == "packed":
                    assert_close(model.run(toys.inputs()), expected, 1e-5)
                else:
                    assert_same(model.run(toys.inputs()), expected)


@pytest.mark.slow
@pytest.mark.measures("times")
def test_toys_agree_while_the_engine_learns_and_plans_anew(any_toy: Path) -> None:
    expected = run_sequentially(any_toy, toys.inputs(), threads=THREADS)
    least = smallest_budget(any_toy)
    for budget in (least, least + 3_000_000, least + 12_000_000, least + 60_000_000):
        with load(any_toy, budget) as model:
            for _ in range(12):
                check_until_packed(model, toys.inputs(), expected)
            assert model.profile.measured


@pytest.mark.parametrize("packed", [False, True])
def test_batch_and_length_change_from_call_to_call(toy: Path, packed: bool) -> None:
    with load(toy, PLENTY if packed else smallest_budget(toy)) as model:
        for batch, length in [(1, 1), (3, 17), (1, 200), (8, 2), (1, 1)]:
            inputs = toys.inputs(batch, length, seed=length)
            expected = run_sequentially(toy, inputs, threads=THREADS)
            assert_close(model.run(inputs), expected, 1e-5)


@pytest.mark.parametrize("inputs", [toys.inputs(0, 5), toys.inputs(2, 0)], ids=["no rows", "no positions"])
def test_empty_inputs_give_empty_outputs(toy: Path, inputs: Any) -> None:
    with load(toy) as model:
        assert model.run(inputs)["last_hidden_state"].shape == (*inputs["input_ids"].shape, 64)


def test_inputs_in_any_memory_layout_give_the_same_answer(toy: Path) -> None:
    inputs = toys.inputs(4, 6)
    expected = run_sequentially(toy, inputs, threads=THREADS)
    transposed = {name: np.asfortranarray(array) for name, array in inputs.items()}
    sliced = {name: np.repeat(array, 2, axis=1)[:, ::2] for name, array in inputs.items()}
    fixed = {name: array.copy() for name, array in inputs.items()}
    for array in fixed.values():
        array.flags.writeable = False
    with load(toy, smallest_budget(toy)) as model:
        for other in (transposed, sliced, fixed):
            assert_same(model.run(other), expected)
    assert all((inputs[name] == fixed[name]).all() for name in inputs), "inputs were changed"


def test_answers_outlive_later_passes_and_the_model(toy_decoder: Path) -> None:
    expected = run_sequentially(toy_decoder, toys.inputs(), threads=THREADS)
    with load(toy_decoder, smallest_budget(toy_decoder)) as model:
        outputs = model.run(toys.inputs())
        for seed in range(5):
            model.run(toys.inputs(seed=seed))
    del model
    gc.collect()
    assert_same(outputs, expected)
