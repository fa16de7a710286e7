"""`Model.hold`: a text goes on from caches that another process has computed, and they count in the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.harness import assert_close, decoder_inputs, smallest_budget
from tests.engine.model.loading import load

import pipeload
from pipeload.format.caches import growth


def _sizes(model: pipeload.Model, inputs: dict[str, Any]) -> dict[str, int]:
    return dict(model._graph_inputs.check(inputs)[1])


@pytest.mark.parametrize("expected", [0, 40])
@pytest.mark.parametrize("length", [1, 9, 12])
def test_a_text_goes_on_from_copied_caches(one_of_each: Path, length: int, expected: int) -> None:
    """Also from the caches of its beginning alone."""
    ids = np.random.default_rng(3).integers(0, 90, (2, 20))
    with load(one_of_each) as first, load(one_of_each) as second, first.new_state() as state, second.new_state() as own:
        prompt = decoder_inputs(first, ids[:, :12], 0)
        first.step(prompt, state)
        own.expect(expected)
        held = second.hold(own, _sizes(first, prompt), length)
        assert held.keys() == state.caches.keys()
        axis, _ = growth(first.manifest)
        for name, array in held.items():
            # In pieces, as they travel.
            pieces = np.split(array, [1], axis)
            pieces[0][:], pieces[1][:] = state.cached(name, 0, 1), state.cached(name, 1, length)
        for begin, end in [(length, 14), (14, 15), (15, 20)]:
            made = second.step(decoder_inputs(second, ids[:, begin:end], begin), own)
            whole = second.run(decoder_inputs(second, ids[:, :end], 0))["logits"]
            assert_close({"logits": made[:, -1]}, {"logits": whole[:, -1]}, 1e-4)
        own.truncate(3)
        made = second.step(decoder_inputs(second, ids[:, 3:6], 3), own)
        assert_close(
            {"logits": made[:, -1]},
            {"logits": second.run(decoder_inputs(second, ids[:, :6], 0))["logits"][:, -1]},
            1e-4,
        )


def test_copied_caches_count_as_computed_ones_do(one_of_each: Path) -> None:
    ids = np.random.default_rng(3).integers(0, 90, (2, 12))
    with load(one_of_each) as model, model.new_state() as computed:
        prompt = decoder_inputs(model, ids, 0)
        model.step(prompt, computed)
        expected = model.plan.cache_bytes
        with model.new_state() as own:
            model.hold(own, _sizes(model, prompt), 12)
            assert model.plan.cache_bytes == model._decoding.cache_bytes() == 2 * expected
            assert (own.batch, own.capacity, own.length) == (computed.batch, computed.capacity, 12)
        assert model._decoding.cache_bytes() == expected


def test_caches_without_room_are_refused_and_nothing_has_changed(toy_decoder: Path) -> None:
    ids = np.random.default_rng(3).integers(0, 90, (2, 12))
    with load(toy_decoder, smallest_budget(toy_decoder) + 2_000_000) as model, model.new_state() as state:
        prompt = decoder_inputs(model, ids, 0)
        expected = model.run(prompt)["logits"]
        with pytest.raises(pipeload.BudgetError, match="the smallest that can"):
            model.hold(state, _sizes(model, prompt), 1_000_000)
        assert (state.batch, state.capacity, state.length, state.caches) == (0, 0, 0, {})
        assert_close({"logits": model.step(prompt, state)[:, -1]}, {"logits": expected[:, -1]}, 1e-4)


def test_a_closed_state_and_one_of_another_model_hold_nothing(toy_decoder: Path) -> None:
    with load(toy_decoder) as model, load(toy_decoder) as other:
        sizes = _sizes(model, decoder_inputs(model, np.zeros((1, 3), np.int64), 0))
        with pytest.raises(pipeload.ConfigError, match="another model"):
            model.hold(other.new_state(), sizes, 3)
        state = model.new_state()
        state.close()
        with pytest.raises(pipeload.ClosedError):
            model.hold(state, sizes, 3)
