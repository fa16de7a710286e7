"""`generate` tells each token as it comes, and the likeliest ones in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.harness import smallest_budget

import pipeload

_PROMPTS = [[5, 6, 7, 8], [9, 10]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "seed": 3},
        {"do_sample": True, "seed": 3, "top_k": 2},
        {"do_sample": True, "seed": 3, "top_k": 0},
        {"repetition_penalty": 1.3},
    ],
)
def test_the_likeliest_tokens_are_those_of_the_models_own_logits(exported_gpt2: Path, options: dict[str, Any]) -> None:
    with pipeload.load(exported_gpt2, smallest_budget(exported_gpt2) + 4_000_000) as model:
        plain = model.generate(_PROMPTS[0], max_new_tokens=6, **options)
        made = model.generate(_PROMPTS[0], max_new_tokens=6, logprobs=True, top_logprobs=3, **options)
        assert made.token_ids == plain.token_ids
        assert plain.top_logprobs is None
        assert made.top_logprobs is not None
        assert made.logprobs is not None
        text = list(_PROMPTS[0])
        for token, logprob, likeliest in zip(made.token_ids, made.logprobs, made.top_logprobs, strict=True):
            ids = np.array([text])
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(text))[None]}
            outputs = model.run({spec.name: inputs[spec.name] for spec in model.inputs})
            logits = outputs[model.outputs[0].name][0, -1].astype(np.float64)
            expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            best = np.argsort(-expected, kind="stable")[:3]
            assert [one for one, _ in likeliest] == best.tolist()
            np.testing.assert_allclose([value for _, value in likeliest], expected[best], atol=1e-5)
            np.testing.assert_allclose(logprob, expected[token], atol=1e-5)
            text.append(token)


def test_each_token_of_each_sequence_is_told_in_its_order(exported_gpt2: Path) -> None:
    told: list[pipeload.NewToken] = []
    with pipeload.load(exported_gpt2, smallest_budget(exported_gpt2) + 4_000_000) as model:
        made = model.generate(
            _PROMPTS,
            max_new_tokens=5,
            do_sample=True,
            seed=1,
            num_return_sequences=2,
            logprobs=True,
            top_logprobs=2,
            on_token=told.append,
        )
    for index, one in enumerate(made):
        own = [token for token in told if token.sequence == index]
        assert tuple(token.token_id for token in own) == one.token_ids
        assert tuple(token.logprob for token in own) == one.logprobs
        assert tuple(token.top_logprobs for token in own) == one.top_logprobs
        assert [token.finish_reason for token in own] == [None] * (len(own) - 1) + [one.finish_reason]
    # A token of each sequence comes from one sweep.
    assert {token.sequence for token in told[:4]} == {0, 1, 2, 3}


def test_an_error_of_the_listener_ends_the_generation_before_the_next_sweep(exported_gpt2: Path) -> None:
    class Enough(Exception):  # noqa: N818
        pass

    told: list[pipeload.NewToken] = []

    def listen(token: pipeload.NewToken) -> None:
        told.append(token)
        if len(told) == 2:
            raise Enough

    with pipeload.load(exported_gpt2, smallest_budget(exported_gpt2) + 4_000_000) as model:
        with pytest.raises(Enough):
            model.generate(_PROMPTS[0], max_new_tokens=50, on_token=listen)
        assert model.stats.passes == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [({"top_logprobs": -1}, "top_logprobs must be"), ({"on_token": 5}, "on_token must be")],
)
def test_wrong_options_are_refused(exported_gpt2: Path, options: dict[str, Any], words: str) -> None:
    with pipeload.load(exported_gpt2, smallest_budget(exported_gpt2) + 4_000_000) as model:
        with pytest.raises(pipeload.ConfigError, match=words):
            model.generate(_PROMPTS[0], **options)
