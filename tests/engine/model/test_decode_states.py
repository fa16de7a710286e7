"""Steps over KV caches give the logits of whole passes; states keep apart, are counted, and end."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    assert_close,
    assert_same,
    decoder_inputs,
    smallest_budget,
)
from tests.engine.model.loading import (
    PLENTY,
    load,
)

import pipeload
from pipeload import decode
from pipeload.format import manifest as manifests
from pipeload.pipeline.session import ShardSession, to_array
from pipeload.planning import needs


def test_caches_that_are_left_out_are_empty(toy_decoder: Path) -> None:
    inputs = toys.inputs()
    empty = {f"past.{k}": np.zeros((2, 0, 64), np.float32) for k in range(4)}
    with load(toy_decoder) as model:
        assert_same(model.run(inputs), model.run(inputs | empty))


def test_a_mask_for_cached_tokens_needs_the_cache(toy_decoder: Path) -> None:
    inputs = toys.inputs(1, 3) | {"attention_mask": np.ones((1, 7), np.int64)}
    with load(toy_decoder) as model:
        # Zeros in place of the four cached tokens would be an answer, and a wrong one.
        with pytest.raises(pipeload.ConfigError, match="attention_mask"):
            model.run(inputs)
        with pytest.raises(pipeload.ConfigError, match="attention_mask"), model.new_state() as state:
            model.step(inputs, state)


def test_outputs_of_a_pass_are_the_caches_of_the_next(toy_decoder: Path) -> None:
    inputs = toys.inputs(2, 9)
    first = {"input_ids": inputs["input_ids"][:, :5], "attention_mask": inputs["attention_mask"][:, :5]}
    with load(toy_decoder) as model:
        whole = model.run(inputs)
        made = model.run(first)
        rest = {"input_ids": inputs["input_ids"][:, 5:], "attention_mask": inputs["attention_mask"]}
        rest |= {f"past.{k}": made[f"present.{k}"] for k in range(4)}
        assert_close({"logits": model.run(rest)["logits"]}, {"logits": whole["logits"][:, 5:]}, 1e-5)


def _check_steps(model: pipeload.Model) -> None:
    ids = np.random.default_rng(1).integers(0, 90, (2, 12))
    with model.new_state(12) as state:
        for begin, end in [(0, 5), (5, 6), (6, 7), (7, 11), (11, 12)]:
            logits = model.step(decoder_inputs(model, ids[:, begin:end], begin), state)[:, -1]
            assert state.length == end
            whole = model.run(decoder_inputs(model, ids[:, :end], 0))["logits"]
            assert_close({"logits": logits}, {"logits": whole[:, -1, :]}, 1e-4)


def test_steps_give_the_logits_of_whole_passes(toy_decoder: Path) -> None:
    for budget in (PLENTY, smallest_budget(toy_decoder) + 2_000_000):
        with load(toy_decoder, budget) as model:
            _check_steps(model)


def test_exported_decoders_step_as_they_run(exported: Path) -> None:
    with load(exported) as model:
        if not model.manifest.caches:
            with pytest.raises(pipeload.ConfigError, match="has no KV cache"):
                model.new_state()
            return
        _check_steps(model)


@pytest.fixture
def in_place(exported: Path) -> Path:
    """An architecture whose caches are written in place."""
    caches = manifests.read(exported).caches
    if not caches:
        pytest.skip("has no caches")
    assert all(cache.in_place for cache in caches)
    return exported


def test_caches_stay_where_they_are_until_they_are_full(in_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CAPACITY_STEP", 8)
    ids = np.random.default_rng(1).integers(0, 90, (2, 18))
    with load(in_place) as model, model.new_state() as state:
        places: list[list[int]] = []
        for begin, end in [(0, 5), (5, 6), (6, 8), (8, 9), (9, 16), (16, 18)]:
            logits = model.step(decoder_inputs(model, ids[:, begin:end], begin), state)[:, -1]
            assert (state.length, state.capacity) == (end, -(-end // 8) * 8)
            held = {name: to_array(value) for name, value in state.caches.items()}
            assert {array.shape[2] for array in held.values()} == {state.capacity}
            assert not any(array[:, :, end:].any() for array in held.values())
            places.append([array.ctypes.data for array in held.values()])
            whole = model.run(decoder_inputs(model, ids[:, :end], 0))
            assert_close({"logits": logits}, {"logits": whole["logits"][:, -1, :]}, 1e-4)
            for cache in model.manifest.caches:
                assert_close({"x": held[cache.input][:, :, :end]}, {"x": whole[cache.output]}, 1e-4)
        assert places[0] == places[1] == places[2]
        assert places[3] == places[4]


def test_a_step_that_fails_while_caches_grow_leaves_what_they_hold(
    in_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "CAPACITY_STEP", 4)
    ids = np.random.default_rng(1).integers(0, 90, (1, 6))
    with load(in_place) as model:
        whole = model.run(decoder_inputs(model, ids, 0))["logits"]
        run, block = ShardSession.run, sum(shard.role == "block" for shard in model.manifest.shards) - 1
        for held in (0, 4):
            with model.new_state() as state:
                if held:
                    model.step(decoder_inputs(model, ids[:, :held], 0), state)

                def fail(session: ShardSession, *given: Any) -> Any:
                    if session._name == f"block.{block:03d}":
                        raise pipeload.RunError("Shard 'block' failed: test")
                    return run(session, *given)

                with monkeypatch.context() as patch:
                    patch.setattr(ShardSession, "run", fail)
                    with pytest.raises(pipeload.RunError):
                        model.step(decoder_inputs(model, ids[:, held:], held), state)
                # The caches of the blocks before have grown.
                assert (state.length, state.capacity) == (held, 2 * held)
                logits = model.step(decoder_inputs(model, ids[:, held:], held), state)[:, -1]
                assert_close({"logits": logits}, {"logits": whole[:, -1, :]}, 1e-4)


def test_a_cache_in_place_counts_once(in_place: Path) -> None:
    with load(in_place) as model:
        ids = np.random.default_rng(1).integers(0, 90, (2, 7))
        outputs = model.run(decoder_inputs(model, ids, 0))
        held = sum(outputs[cache.output].nbytes for cache in model.manifest.caches)
        dims = {"batch_size": 2, "sequence_length": 7, "past_sequence_length": 0}
        assert needs.cache_bytes(model.manifest, dims) == held


def test_several_states_do_not_disturb_each_other(toy_decoder: Path) -> None:
    with load(toy_decoder) as model, model.new_state() as one, model.new_state() as two:
        ids = np.arange(10).reshape(1, 10)
        for k in range(5):
            model.step(decoder_inputs(model, ids[:, k : k + 1], k), one)
            model.step(decoder_inputs(model, ids[:, 9 - k : 10 - k], k), two)
        expected = model.run(decoder_inputs(model, ids[:, :6], 0))["logits"][:, -1]
        assert_close({"x": model.step(decoder_inputs(model, ids[:, 5:6], 5), one)[:, -1]}, {"x": expected}, 1e-5)


def test_a_failed_step_leaves_the_state_as_it_was(toy_decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(6).reshape(1, 6)
    with load(toy_decoder, smallest_budget(toy_decoder)) as model, model.new_state() as state:
        model.step(decoder_inputs(model, ids[:, :5], 0), state)
        before = dict(state.caches)
        with pytest.raises(pipeload.ConfigError):
            model.step(decoder_inputs(model, ids[:, 5:] + 10**6, 5), state)
        assert (state.length, state.caches) == (5, before)
        logits = model.step(decoder_inputs(model, ids[:, 5:], 5), state)[:, -1]
        assert_close({"x": logits}, {"x": model.run(decoder_inputs(model, ids, 0))["logits"][:, -1]}, 1e-5)


def test_a_state_that_does_not_fit_is_refused_and_hinders_nobody(toy_decoder: Path) -> None:
    with load(toy_decoder, smallest_budget(toy_decoder) + 2_000_000) as model, model.new_state() as state:
        long = np.zeros((1, 60_000), np.int64)
        with pytest.raises(pipeload.BudgetError):
            model.step(decoder_inputs(model, long, 0), state)
        # Neither the others nor the state itself: it does not hold memory that it did not get.
        model.run(toys.inputs(1, 3))
        model.step(decoder_inputs(model, long[:, :3], 0), state)


def test_a_closed_state_is_refused(toy_decoder: Path) -> None:
    with load(toy_decoder) as model:
        with model.new_state() as state:
            model.step(decoder_inputs(model, np.zeros((1, 2), np.int64), 0), state)
        assert not state.caches
        state.close()
        with pytest.raises(pipeload.ClosedError, match="decode state is closed"):
            model.step(decoder_inputs(model, np.zeros((1, 2), np.int64), 0), state)


def test_a_state_of_another_model_is_refused(toy_decoder: Path) -> None:
    with load(toy_decoder) as model, load(toy_decoder) as other, model.new_state() as state:
        with pytest.raises(pipeload.ConfigError, match="the caches of another model"):
            other.step(decoder_inputs(other, np.zeros((1, 2), np.int64), 0), state)
        assert state.length == 0
        model.step(decoder_inputs(model, np.zeros((1, 2), np.int64), 0), state)


def test_open_states_are_counted_until_they_are_closed_or_forgotten(toy_decoder: Path) -> None:
    with load(toy_decoder) as model:
        state, other = model.new_state(10_000), model.new_state(10_000)
        model.run(toys.inputs(1, 1))
        two = model.plan.cache_bytes
        assert two >= 2 * 4 * 10_000 * 64 * 4
        state.close()
        # Memory that was needed lately may be needed again soon: the plan counts it for some more passes.
        for _ in range(20):
            model.run(toys.inputs(1, 1))
        assert model.plan.cache_bytes == two // 2
        del other
        gc.collect()
        for _ in range(20):
            model.run(toys.inputs(1, 1))
        assert model.plan.cache_bytes == 0
