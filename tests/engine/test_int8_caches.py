"""Models whose KV caches are int8: close to the same models with float32 caches, in less of their memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.engine.harness import assert_close, smallest_budget
from tests.greedy import NEW_TOKENS, PROMPTS
from tests.models import INT8_NAME

import pipeload
from pipeload import decode
from pipeload.pipeline.session import to_array

_CACHES_BYTES = 12_000_000
"""Room for the caches of the tiny models."""
_CLOSE = 0.01
"""Of the range of logits. Each cached value is off by up to 1 / 254 of the largest of its head; over three or four
layers 0.003 was seen."""

Arrays = dict[str, NDArray[np.int64]]


def _load(directory: Path) -> pipeload.Model:
    return pipeload.load(directory, smallest_budget(directory) + _CACHES_BYTES)


def _inputs(model: pipeload.Model, ids: NDArray[np.int64], begin: int = 0) -> Arrays:
    """The tokens from `begin` on, without padding."""
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    offered = {"input_ids": ids[:, begin:], "attention_mask": np.ones_like(ids), "position_ids": positions[:, begin:]}
    return {spec.name: offered[spec.name] for spec in model.inputs}


def test_logits_are_close_to_those_of_float32_caches(exported_generator: Path) -> None:
    ids = np.random.default_rng(2).integers(0, 1000, (2, 96))
    with _load(exported_generator) as plain, _load(exported_generator / INT8_NAME) as rounded:
        wanted, found = (model.run(_inputs(model, ids))["logits"] for model in (plain, rounded))
        assert_close({"logits": found}, {"logits": wanted}, _CLOSE)
        assert not np.array_equal(found, wanted)


@pytest.mark.slow
def test_greedy_tokens_are_the_likeliest_or_nearly_so(exported_generator: Path) -> None:
    prompts = [list(prompt) for prompt in PROMPTS]
    with _load(exported_generator / INT8_NAME) as model:
        together = [one.token_ids for one in model.generate(prompts, max_new_tokens=NEW_TOKENS)]
        alone = [model.generate(prompt, max_new_tokens=NEW_TOKENS).token_ids for prompt in prompts]
    with _load(exported_generator) as plain:
        for made in (together, alone):
            for prompt, tokens in zip(prompts, made, strict=True):
                assert len(tokens) == NEW_TOKENS
                ids = np.array([[*prompt, *tokens]])
                logits = plain.run(_inputs(plain, ids))["logits"][0, len(prompt) - 1 : -1]
                chosen = logits[np.arange(NEW_TOKENS), list(tokens)]
                # Both the chosen one and the likeliest one may be off.
                assert (logits.max(axis=1) - chosen <= 2 * _CLOSE * np.ptp(logits)).all()


def test_steps_and_pieces_fill_the_caches_as_a_whole_pass_does(
    exported_generator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "CAPACITY_STEP", 8)
    monkeypatch.setattr(decode, "_PIECE_TOKENS", 4)
    ids = np.random.default_rng(1).integers(0, 1000, (2, 18))
    with _load(exported_generator / INT8_NAME) as model, model.new_state() as state:
        for begin, end in [(0, 7), (7, 8), (8, 9), (9, 18)]:
            logits = model.step(_inputs(model, ids[:, :end], begin), state)[:, -1]
            whole = model.run(_inputs(model, ids[:, :end]))
            # A token is rounded by itself, so all that may differ is a value in the middle between two steps.
            assert_close({"logits": logits}, {"logits": whole["logits"][:, -1, :]}, _CLOSE / 2)
            for cache in model.manifest.caches:
                held, wanted = to_array(state.caches[cache.input]), whole[cache.output]
                assert held.shape[2] == state.capacity
                assert not held[:, :, end:].any()
                assert held.dtype == wanted.dtype
                if cache.scale:
                    assert np.abs(held[:, :, :end].astype(np.int16) - wanted).max() <= 1
                else:
                    assert_close({"scale": held[:, :, :end]}, {"scale": wanted}, _CLOSE / 2)


def test_the_budget_counts_int8_and_scales(exported_generator: Path) -> None:
    counted = {}
    for directory in (exported_generator, exported_generator / INT8_NAME):
        with _load(directory) as model, model.new_state(128) as state:
            model.step(_inputs(model, np.ones((1, 3), np.int64)), state)
            held = sum(to_array(value).nbytes for value in state.caches.values())
            counted[directory.name] = model.plan.cache_bytes
            assert held == model.plan.cache_bytes
            size = int(model.manifest.outputs[1].shape[-1])
    assert counted[INT8_NAME] * 4 * size == counted[exported_generator.name] * (size + 4)
