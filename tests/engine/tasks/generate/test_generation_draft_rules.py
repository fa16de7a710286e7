"""The savings of drafts, the figures about them, and the options that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import smallest_budget
from tests.engine.tasks.generate.drafting import CYCLE, PROMPT, assert_counted, assert_same, load, steered
from tests.engine.tasks.generate.drafting import computed as computed  # a fixture
from tests.engine.toy import make_toy

import pipeload
from pipeload.tasks.generate.drafts import DraftLength

_ROOMY_BYTES = 30_000_000
"""Room enough for several models, whose budgets are all for the one process."""


def test_without_drafts_each_token_takes_a_sweep(decoder: Path) -> None:
    with load(decoder) as model:
        for options in ({}, {"do_sample": True, "seed": 1, "eos_token_id": list(range(30))}):
            made = model.generate(PROMPT, max_new_tokens=9, **options)
            assert (made.sweeps, made.drafted_tokens, made.accepted_tokens) == (len(made.token_ids), 0, 0)
        together = model.generate([PROMPT, PROMPT[::-1]], max_new_tokens=5)
        assert [one.sweeps for one in together] == [5, 5]


def test_a_text_that_repeats_itself_takes_fewer_sweeps(decoder: Path) -> None:
    with load(decoder) as model:
        before = model.stats.passes
        made = model.generate(PROMPT, max_new_tokens=30, logits_processor=[steered()], prompt_lookup_num_tokens=5)
        assert made.token_ids == CYCLE * 5
        assert made.sweeps < len(made.token_ids)
        assert 0 < made.accepted_tokens <= made.drafted_tokens
        assert_counted(made)
        # A pass counts when its caller has the answer already.
        assert made.sweeps - 1 <= model.stats.passes - before <= made.sweeps


def test_what_was_made_is_looked_up_too(toy_decoder: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "logits_processor": [steered()]}
    with load(toy_decoder) as model:
        made = model.generate([5], prompt_lookup_num_tokens=4, **options)
        assert made.accepted_tokens > 0
        assert_same(made, model.generate([5], **options))


def test_nothing_is_drafted_where_nothing_repeats_itself(toy_decoder: Path) -> None:
    endless = steered(cycle=range(20, 90))
    with load(toy_decoder) as model:
        for size in (1, 3):
            made = model.generate(
                [20, 21],
                max_new_tokens=20,
                logits_processor=[endless],
                prompt_lookup_num_tokens=4,
                max_matching_ngram_size=size,
            )
            assert made.token_ids == tuple(range(22, 42))
            assert (made.drafted_tokens, made.accepted_tokens, made.sweeps) == (0, 0, 20)


@pytest.mark.parametrize("most", [1, 4])
def test_no_more_is_drafted_than_was_asked_for(toy_decoder: Path, computed: list[int], most: int) -> None:
    with load(toy_decoder) as model, load(toy_decoder, _ROOMY_BYTES) as twin:
        options: dict[str, Any] = {"max_new_tokens": 24, "logits_processor": [steered()]}
        made = model.generate(PROMPT, prompt_lookup_num_tokens=most, **options)
        assert len(computed) == made.sweeps
        assert max(computed[1:]) <= 1 + most
        assert made.drafted_tokens <= most * made.sweeps
        made = model.generate(PROMPT, assistant_model=twin, num_assistant_tokens=most, max_new_tokens=24)
        assert made.drafted_tokens <= most * made.sweeps


@pytest.mark.slow
def test_a_draft_ends_where_the_text_must_end(exported_gpt2: Path) -> None:
    """No position beyond the last that the model has, and no cache beyond the plan."""
    prompt = [*CYCLE] * 16
    options: dict[str, Any] = {"max_new_tokens": 128 - len(prompt), "logits_processor": [steered()]}
    with load(exported_gpt2) as model, load(exported_gpt2, _ROOMY_BYTES) as twin:
        plain = model.generate(prompt, **options)
        assert_same(model.generate(prompt, prompt_lookup_num_tokens=50, **options), plain)
        assert_same(model.generate(prompt, assistant_model=twin, num_assistant_tokens=50, **options), plain)
        with pytest.raises(pipeload.ConfigError, match="128"):
            model.generate(prompt, max_new_tokens=129 - len(prompt), prompt_lookup_num_tokens=2)


def test_a_model_accepts_all_that_its_twin_drafts(decoder: Path) -> None:
    with load(decoder) as model, load(decoder, _ROOMY_BYTES) as twin:
        for prompt in (PROMPT, [3, 14, 15, 92]):
            made = model.generate(prompt, assistant_model=twin, max_new_tokens=24)
            assert_same(made, model.generate(prompt, max_new_tokens=24))
            assert 0 < made.accepted_tokens == made.drafted_tokens
            assert made.sweeps < 24
            assert_counted(made)


def test_an_assistant_is_left_as_it_was(toy_decoder: Path, computed: list[int]) -> None:
    """It answers as before, keeps no caches, and may serve the next text, or its own model's."""
    with load(toy_decoder) as model, load(toy_decoder, _ROOMY_BYTES) as twin:
        plain = twin.generate(PROMPT, max_new_tokens=8)
        for _ in range(2):
            assert_same(model.generate(PROMPT, assistant_model=twin, max_new_tokens=8), plain)
        for failing in (OSError("a full disk"), KeyboardInterrupt()):

            def fail(*_: Any, failing: BaseException = failing) -> Any:
                raise failing

            with pytest.raises(type(failing)):
                model.generate(PROMPT, assistant_model=twin, max_new_tokens=8, logits_processor=[fail])
        assert_same(twin.generate(PROMPT, max_new_tokens=8), plain)
        for one in (model, twin):
            for _ in range(20):
                one.generate([1], max_new_tokens=1)
            assert one.plan.cache_bytes <= 4 * 2 * 128 * 64 * 4


@pytest.mark.parametrize("wrong", [-1, True, 2.0, 1.5, "3"])
@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens"])
def test_numbers_that_cannot_work_are_named(toy_decoder: Path, name: str, wrong: Any) -> None:
    with load(toy_decoder) as model, load(toy_decoder, _ROOMY_BYTES) as twin:
        assisted = name == "num_assistant_tokens"
        options: dict[str, Any] = {"assistant_model": twin} if assisted else {"prompt_lookup_num_tokens": 3}
        with pytest.raises(pipeload.ConfigError, match=name):
            model.generate(PROMPT, max_new_tokens=2, **options | {name: wrong})


def test_drafts_are_for_one_sequence(toy_decoder: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2}
    with load(toy_decoder) as model, load(toy_decoder, _ROOMY_BYTES) as twin:
        drafts: list[dict[str, Any]] = [{"prompt_lookup_num_tokens": 3}, {"assistant_model": twin}]
        for given in drafts:
            with pytest.raises(pipeload.ConfigError):
                model.generate([PROMPT, PROMPT], **options, **given)
            with pytest.raises(pipeload.ConfigError):
                model.generate(PROMPT, num_return_sequences=2, do_sample=True, **options, **given)
        with pytest.raises(pipeload.ConfigError):
            model.generate(PROMPT, prompt_lookup_num_tokens=3, assistant_model=twin, **options)
        # Refused before anything was run, and the next call works.
        assert model.stats.passes == 0
        assert len(model.generate(PROMPT, **options).token_ids) == 2


def test_assistants_that_cannot_help_are_named(toy_decoder: Path, toy: Path, exported_gpt2: Path) -> None:
    with load(toy_decoder) as model:
        with load(exported_gpt2, _ROOMY_BYTES) as other, pytest.raises(pipeload.ConfigError, match="vocabular"):
            model.generate(PROMPT, assistant_model=other, max_new_tokens=4)
        with load(toy, _ROOMY_BYTES) as encoder, pytest.raises(pipeload.ConfigError):
            model.generate(PROMPT, assistant_model=encoder, max_new_tokens=4)
        for wrong in (str(toy_decoder), toy_decoder, 3):
            with pytest.raises(pipeload.ConfigError):
                model.generate(PROMPT, assistant_model=wrong, max_new_tokens=4)
        with load(toy_decoder, _ROOMY_BYTES) as closed:
            pass
        with pytest.raises((pipeload.ClosedError, pipeload.ConfigError), match="closed"):
            model.generate(PROMPT, assistant_model=closed, max_new_tokens=4)
        assert model.generate(PROMPT, max_new_tokens=4).sweeps == 4


def test_the_other_way_round_a_larger_vocabulary_is_refused_too(
    toy_decoder: Path, exported_gpt2: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    with load(exported_gpt2) as model, load(toy_decoder, _ROOMY_BYTES) as other:
        with pytest.raises(pipeload.ConfigError, match="vocabular"):
            model.generate(PROMPT, assistant_model=other, max_new_tokens=4)
    # The same vocabulary, another model: that is an assistant's purpose.
    deeper = make_toy(tmp_path / "deeper", blocks=5, width=48, decoder=True, seed=3)
    with load(deeper) as model, load(toy_decoder, _ROOMY_BYTES) as other:
        made = model.generate(PROMPT, assistant_model=other, max_new_tokens=12)
        assert_same(made, model.generate(PROMPT, max_new_tokens=12))


def test_a_draft_model_that_fails_is_not_the_end_of_the_text(
    toy_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftLength, "choose", lambda _, most: min(2, most))
    with load(toy_decoder) as model, load(toy_decoder, _ROOMY_BYTES) as twin:
        plain = model.generate(PROMPT, max_new_tokens=12)

        def close(token_ids: Any, logits: Any) -> Any:
            if token_ids.shape[1] == len(PROMPT) + 4:
                twin.close()
            return logits

        with pytest.warns(UserWarning, match="without drafts, since the draft model failed: The model is closed"):
            made = model.generate(PROMPT, max_new_tokens=12, assistant_model=twin, logits_processor=[close])
        assert made.token_ids == plain.token_ids
        assert made.accepted_tokens > 0


def test_what_a_draft_model_is_going_to_keep_is_planned_for(toy_decoder: Path) -> None:
    alone = smallest_budget(toy_decoder)
    with load(toy_decoder, _ROOMY_BYTES) as draft:
        # Whether or not it has read its shards yet.
        assert smallest_budget(toy_decoder) - alone > 0.9 * draft.manifest.weight_bytes
