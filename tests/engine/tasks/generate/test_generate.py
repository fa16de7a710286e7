from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks.fakes import (
    ToyDecoder,
    manifest,
    toy_continuation,
    write_bert_tokenizer,
    write_gpt_tokenizer,
    write_json,
)

from pipeload.errors import ConfigError, RunError
from pipeload.tasks.generate.generate import Generation, generate

PROMPT = [3, 1, 4]


def test_a_prompt_of_token_ids_is_continued_token_by_token(tmp_path: Path) -> None:
    model = ToyDecoder(tmp_path)
    result = generate(model, PROMPT, max_new_tokens=6)
    assert result == Generation(
        text=None, token_ids=tuple(toy_continuation(PROMPT, 6)), prompt_tokens=3, finish_reason="length", sweeps=6
    )


def test_each_step_runs_only_what_is_new(tmp_path: Path) -> None:
    model = ToyDecoder(tmp_path)
    generate(model, PROMPT, max_new_tokens=3)
    assert [step["input_ids"].shape for step in model.steps] == [(1, 3), (1, 1), (1, 1)]
    assert [step["attention_mask"].shape for step in model.steps] == [(1, 3), (1, 4), (1, 5)]
    assert [step["position_ids"].tolist() for step in model.steps] == [[[0, 1, 2]], [[3]], [[4]]]
    assert all(array.dtype == np.int64 for step in model.steps for array in step.values())


def test_the_state_is_planned_for_and_given_back(tmp_path: Path) -> None:
    model = ToyDecoder(tmp_path)
    generate(model, PROMPT, max_new_tokens=3)
    assert (model.capacities, model.states[0].expected) == ([0], 6)
    assert model.states[0].closed


def test_prompts_of_different_lengths_run_as_one_batch(tmp_path: Path) -> None:
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    model = ToyDecoder(tmp_path)
    results = generate(model, prompts, max_new_tokens=7)
    assert len(model.steps) == 7
    assert [list(result.token_ids) for result in results] == [toy_continuation(prompt, 7) for prompt in prompts]
    assert [result.prompt_tokens for result in results] == [5, 1, 3]


def test_every_kind_of_ids_is_a_prompt(tmp_path: Path) -> None:
    expected = generate(ToyDecoder(tmp_path), PROMPT, max_new_tokens=2)
    prompts: list[Any] = [tuple(PROMPT), np.array(PROMPT, np.int32), [np.int64(i) for i in PROMPT], range(3)]
    for prompt in prompts[:3]:
        assert generate(ToyDecoder(tmp_path), prompt, max_new_tokens=2) == expected
    assert generate(ToyDecoder(tmp_path), prompts[3], max_new_tokens=1).prompt_tokens == 3
    batch: Any = np.array([PROMPT, PROMPT])
    assert generate(ToyDecoder(tmp_path), batch, max_new_tokens=2) == [expected, expected]
    assert generate(ToyDecoder(tmp_path), [PROMPT], max_new_tokens=2) == [expected]


@pytest.mark.parametrize(
    ("generation", "config", "end"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 5}, 7),
        ({"eos_token_id": [8, 7]}, {}, 7),
        ({"_from_model_config": True}, {"eos_token_id": 7}, 7),
        (None, {"eos_token_id": [7]}, 7),
    ],
)
def test_the_end_of_text_ends_it(
    tmp_path: Path, generation: dict[str, object] | None, config: dict[str, object], end: int
) -> None:
    write_json(tmp_path, "config.json", config)
    if generation is not None:
        write_json(tmp_path, "generation_config.json", generation)
    result = generate(ToyDecoder(tmp_path, script=[4, 5, end, 9]), PROMPT)
    assert (result.token_ids, result.finish_reason) == ((4, 5, end), "eos")


def test_a_file_that_names_no_end_has_none(tmp_path: Path) -> None:
    """As in transformers, which asks config.json only where there is no generation_config.json."""
    write_json(tmp_path, "config.json", {"eos_token_id": 5})
    write_json(tmp_path, "generation_config.json", {"max_new_tokens": 4})
    result = generate(ToyDecoder(tmp_path, script=[4, 5, 6, 9]), PROMPT)
    assert (result.token_ids, result.finish_reason) == ((4, 5, 6, 9), "length")


def test_the_length_of_a_file_counts_the_prompt(tmp_path: Path) -> None:
    write_json(tmp_path, "generation_config.json", {"max_length": 9})
    assert len(generate(ToyDecoder(tmp_path), [3, 1, 4, 1, 5]).token_ids) == 4
    assert [len(one.token_ids) for one in generate(ToyDecoder(tmp_path), [[3, 1, 4, 1, 5], [9]])] == [4, 4]
    assert len(generate(ToyDecoder(tmp_path), [3], max_new_tokens=6).token_ids) == 6
    with pytest.raises(ConfigError, match=r"10 tokens, and .* sets max_length to 9 .* Pass max_new_tokens"):
        generate(ToyDecoder(tmp_path), [3] * 10)


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [
        ("num_beams", 4, 1),
        ("bad_words_ids", [[3]], None),
        ("suppress_tokens", [5], []),
        ("begin_suppress_tokens", [5], None),
        ("sequence_bias", [[[3], 2.0]], None),
        ("forced_eos_token_id", 5, None),
        ("exponential_decay_length_penalty", [2, 1.5], None),
        ("min_length", 9, 0),
        ("encoder_repetition_penalty", 1.5, 1.0),
        ("guidance_scale", 2.0, 1),
    ],
)
def test_a_setting_that_would_change_the_text_is_named(tmp_path: Path, name: str, value: object, off: object) -> None:
    for each in (value, off):
        folder = tmp_path / str(each == value)
        folder.mkdir()
        write_json(folder, "generation_config.json", {name: each})
        warned = pytest.warns(UserWarning, match=f"sets {name}, and pipeload does not apply it")
        with warned if each == value else nullcontext():
            generate(ToyDecoder(folder), PROMPT, max_new_tokens=2)


def test_a_row_that_has_ended_waits_for_the_others(tmp_path: Path) -> None:
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    wholes = [toy_continuation(prompt, 8) for prompt in prompts]
    end = next(token for token in wholes[1][1:] if token not in wholes[0])
    write_json(tmp_path, "config.json", {"eos_token_id": end})
    results = generate(ToyDecoder(tmp_path), prompts, max_new_tokens=8)
    for whole, result in zip(wholes, results, strict=True):
        ended = end in whole
        expected = whole[: whole.index(end) + 1] if ended else whole
        assert list(result.token_ids) == expected
        assert result.finish_reason == ("eos" if ended else "length")
    assert {result.finish_reason for result in results} == {"eos", "length"}


def test_all_rows_ended_is_the_end(tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"eos_token_id": 7})
    model = ToyDecoder(tmp_path, script=[4, 7])
    generate(model, [PROMPT, PROMPT], max_new_tokens=50)
    assert len(model.steps) == 2


def test_inputs_are_those_of_the_graph(tmp_path: Path) -> None:
    model = ToyDecoder(tmp_path, ("input_ids", "token_type_ids"))
    result = generate(model, [PROMPT, PROMPT], max_new_tokens=2)
    assert list(result[0].token_ids) == toy_continuation(PROMPT, 2)
    assert set(model.steps[0]) == {"input_ids", "token_type_ids"}


@pytest.mark.parametrize("inputs", [("input_ids",), ("input_ids", "attention_mask"), ("input_ids", "position_ids")])
def test_padding_needs_a_mask_and_positions(tmp_path: Path, inputs: tuple[str, ...]) -> None:
    model = ToyDecoder(tmp_path, inputs)
    prompts = [[1, 2], [3], [4, 5]]
    results = generate(model, prompts, max_new_tokens=2)
    assert [list(one.token_ids) for one in results] == [toy_continuation(prompt, 2) for prompt in prompts]
    # Those of one length share passes, and no text is padded.
    assert [step["input_ids"].shape for step in model.steps] == [(2, 2), (2, 1), (1, 1), (1, 1)]


def test_texts_in_texts_out(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    write_bert_tokenizer(tmp_path)
    model = ToyDecoder(tmp_path, script=[7, 8, 17])
    result = generate(model, "the cat", max_new_tokens=3)
    assert (result.text, result.prompt_tokens) == (" dog sat anna", 4)
    both = generate(ToyDecoder(tmp_path, script=[7, 8, 17]), ["the cat", "the dog sat"], max_new_tokens=3)
    assert [one.text for one in both] == [" dog sat anna"] * 2


def test_ids_get_a_text_too_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    write_bert_tokenizer(tmp_path)
    assert generate(ToyDecoder(tmp_path, script=[7, 8]), PROMPT, max_new_tokens=2).text == "dog sat"


def test_pieces_are_streamed_as_they_come(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    write_bert_tokenizer(tmp_path)
    model = ToyDecoder(tmp_path, script=[7, 11, 2, 8])
    seen: list[tuple[int, str]] = []
    result = generate(model, "the", max_new_tokens=4, streamer=lambda piece: seen.append((len(model.steps), piece)))
    assert seen == [(1, " dog"), (2, "s"), (4, " sat")]
    assert result.text == " dogs sat"


def test_a_character_in_several_tokens_is_streamed_whole(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    write_gpt_tokenizer(tmp_path)
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("é🦜").ids
    model = ToyDecoder(tmp_path, script=ids)
    model.vocabulary = 300
    pieces: list[str] = []
    result = generate(model, "a", max_new_tokens=len(ids), streamer=pieces.append)
    assert pieces == ["é", "🦜"]
    assert result.text == "é🦜"
    cut: list[str] = []
    model = ToyDecoder(tmp_path, script=ids)
    model.vocabulary = 300
    result = generate(model, "a", max_new_tokens=len(ids) - 1, streamer=cut.append)
    assert "".join(cut) == result.text


def test_a_stream_that_fails_ends_the_generation(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    write_bert_tokenizer(tmp_path)
    model = ToyDecoder(tmp_path, script=[7, 8, 9])

    def streamer(piece: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        generate(model, "the", max_new_tokens=3, streamer=streamer)
    assert len(model.steps) == 1
    assert model.states[0].closed


def test_a_step_that_fails_gives_the_state_back(tmp_path: Path) -> None:
    model = ToyDecoder(tmp_path, script=[7])
    with pytest.raises(IndexError):
        generate(model, PROMPT, max_new_tokens=3)
    assert model.states[0].closed


def test_nan_is_no_token(tmp_path: Path) -> None:
    model = ToyDecoder(tmp_path)
    model.step = lambda *_, **__: np.array([[[0, np.nan, 1]]], np.float32)  # type: ignore[method-assign]
    with pytest.raises(RunError, match="NaN"):
        generate(model, PROMPT)


def test_the_longest_that_fits_and_one_more(tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"max_position_embeddings": 10})
    assert len(generate(ToyDecoder(tmp_path), PROMPT, max_new_tokens=7).token_ids) == 7
    with pytest.raises(ConfigError, match=r"3 tokens; with 8 new ones that is more than the 10"):
        generate(ToyDecoder(tmp_path), PROMPT, max_new_tokens=8)


@pytest.mark.parametrize("prompt", [[], [[]], [[1], []], np.array([], np.int64)])
def test_an_empty_prompt_is_refused(tmp_path: Path, prompt: Any) -> None:
    model = ToyDecoder(tmp_path)
    with pytest.raises(ConfigError, match="prompt is empty"):
        generate(model, prompt)
    assert model.states == []


@pytest.mark.parametrize("prompt", ["", [""], ["a", ""]])
def test_an_empty_text_is_refused(tmp_path: Path, prompt: Any) -> None:
    pytest.importorskip("tokenizers")
    write_gpt_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="prompt is empty"):
        generate(ToyDecoder(tmp_path), prompt)


@pytest.mark.parametrize(("prompt", "outside"), [([3, 20], 20), ([3, -1], -1), ([[3], [2**40]], 2**40)])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, prompt: Any, outside: int) -> None:
    write_json(tmp_path, "config.json", {"vocab_size": 20})
    with pytest.raises(ConfigError, match=f"Token id {outside} is outside the model's vocabulary of 20"):
        generate(ToyDecoder(tmp_path), prompt)


@pytest.mark.parametrize(
    "prompt", [[3, "a"], [["a", 3]], [3.5], [None], [b"a"], b"a", 3, None, np.array([0.5]), np.array(3)]
)
def test_other_prompts_are_refused(tmp_path: Path, prompt: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be a text or a sequence of token ids|has no tokenizer"):
        generate(ToyDecoder(tmp_path), prompt)


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json.*Pass token ids"):
        generate(ToyDecoder(tmp_path), "the cat")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        generate(ToyDecoder(tmp_path), PROMPT, streamer=print)


def test_a_stream_is_for_one_prompt(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="streamer takes a single sequence"):
        generate(ToyDecoder(tmp_path), [PROMPT, PROMPT], streamer=print)


def test_no_new_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens must be a whole number from 1 on, not 0"):
        generate(ToyDecoder(tmp_path), PROMPT, max_new_tokens=0)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this one is for fill-mask"):
        generate(ToyDecoder(tmp_path, task="fill-mask"), PROMPT)
    with pytest.raises(ConfigError, match=r"without KV caches.*text-generation-with-past"):
        generate(ToyDecoder(tmp_path, cached=False), PROMPT)


def test_an_input_that_generation_cannot_make_is_named(tmp_path: Path) -> None:
    model = ToyDecoder(tmp_path)
    outputs = {spec.name: spec.shape for spec in model.manifest.outputs}
    model.manifest = manifest("text-generation", ("input_ids", "use_cache_branch"), outputs, cached=True)
    with pytest.raises(ConfigError, match="use_cache_branch"):
        generate(model, PROMPT)


def _sampled(directory: Path, prompt: Any, **options: Any) -> Any:
    return generate(ToyDecoder(directory), prompt, **({"do_sample": True, "seed": 3, "max_new_tokens": 9} | options))


def test_the_same_seed_gives_the_same_tokens(tmp_path: Path) -> None:
    one = _sampled(tmp_path, PROMPT)
    assert _sampled(tmp_path, PROMPT) == one
    assert _sampled(tmp_path, PROMPT, seed=4) != one
    assert _sampled(tmp_path, PROMPT, seed=None) != _sampled(tmp_path, PROMPT, seed=None)
    assert one != generate(ToyDecoder(tmp_path), PROMPT, max_new_tokens=9)


def test_draws_do_not_depend_on_what_else_is_in_the_batch(tmp_path: Path) -> None:
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "top_p": 0.9, "temperature": 0.8, "logprobs": True}
    together = _sampled(tmp_path, prompts, **options)
    assert _sampled(tmp_path, prompts[0], **options) == together[0]
    for others in ([7, 7, 7, 7, 7, 7, 7], [1]):
        assert _sampled(tmp_path, [others, prompts[1], others], **options)[1] == together[1]
        assert _sampled(tmp_path, [others, others, prompts[2]], **options)[2] == together[2]
    assert _sampled(tmp_path, [PROMPT] * 2)[0] != _sampled(tmp_path, [PROMPT] * 2)[1]


def test_a_row_that_ends_early_leaves_the_draws_of_the_others_alone(tmp_path: Path) -> None:
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    whole = _sampled(tmp_path, prompts)
    end = next(token for token in whole[1].token_ids[:4] if token not in whole[0].token_ids + whole[2].token_ids)
    ended = _sampled(tmp_path, prompts, eos_token_id=end)
    assert (ended[0], ended[2]) == (whole[0], whole[2])
    assert ended[1].token_ids == whole[1].token_ids[: whole[1].token_ids.index(end) + 1]


def test_several_sequences_of_a_prompt(tmp_path: Path) -> None:
    model = ToyDecoder(tmp_path)
    prompts = [PROMPT, [9]]
    four: Any = generate(model, prompts, num_return_sequences=2, do_sample=True, seed=1, max_new_tokens=6)
    assert [one.prompt_tokens for one in four] == [3, 3, 1, 1]
    assert len({one.token_ids for one in four}) == 4
    assert len(model.steps) == 6
    single = generate(ToyDecoder(tmp_path), PROMPT, num_return_sequences=2, do_sample=True, seed=1, max_new_tokens=6)
    assert single == four[:2]
    assert generate(ToyDecoder(tmp_path), PROMPT, num_return_sequences=1, max_new_tokens=2) == [
        generate(ToyDecoder(tmp_path), PROMPT, max_new_tokens=2)
    ]
    with pytest.raises(ConfigError, match="streamer takes a single sequence"):
        generate(ToyDecoder(tmp_path), PROMPT, num_return_sequences=2, do_sample=True, streamer=print)


def test_the_model_says_how_it_wants_to_be_sampled(tmp_path: Path) -> None:
    explicit = _sampled(tmp_path, PROMPT, top_k=0, temperature=3.0)
    write_json(tmp_path, "generation_config.json", {"do_sample": True, "temperature": 3.0, "max_new_tokens": 9})
    assert generate(ToyDecoder(tmp_path), PROMPT, seed=3, top_k=0) == explicit
    assert list(generate(ToyDecoder(tmp_path), PROMPT, do_sample=False).token_ids) == toy_continuation(PROMPT, 9)


def test_a_text_does_not_end_before_min_new_tokens(tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"eos_token_id": [7, 9000]})
    result = generate(ToyDecoder(tmp_path, script=[4, 7, 7, 7, 7]), PROMPT, min_new_tokens=3)
    assert (result.token_ids, result.finish_reason) == ((4, 0, 0, 7), "eos")


def test_other_ends_of_text(tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"eos_token_id": 7})
    script = [4, 7, 5, 6]
    assert generate(ToyDecoder(tmp_path, script=script), PROMPT, eos_token_id=5).token_ids == (4, 7, 5)
    assert generate(ToyDecoder(tmp_path, script=script), PROMPT, eos_token_id=(6, 5)).token_ids == (4, 7, 5)
    endless = generate(ToyDecoder(tmp_path, script=script), PROMPT, eos_token_id=[], max_new_tokens=4)
    assert (endless.token_ids, endless.finish_reason) == ((4, 7, 5, 6), "length")


def test_ngrams_of_the_prompt_are_not_repeated(tmp_path: Path) -> None:
    result = generate(ToyDecoder(tmp_path, script=[4, 1, 4]), [4, 1], no_repeat_ngram_size=2, max_new_tokens=3)
    assert result.token_ids == (4, 0, 4)


def test_when_nothing_is_left_that_is_said(tmp_path: Path) -> None:
    model = ToyDecoder(tmp_path)
    model.vocabulary = 2
    with pytest.raises(ConfigError, match="No token can be chosen: the largest logit is -inf"):
        generate(model, [0], no_repeat_ngram_size=1, max_new_tokens=3)
    assert model.states[0].closed


def test_processors_see_each_sequence_without_padding(tmp_path: Path) -> None:
    seen: list[tuple[list[list[int]], tuple[int, ...], Any]] = []

    def only_five(token_ids: Any, logits: Any) -> Any:
        seen.append((token_ids.tolist(), logits.shape, (token_ids.dtype, logits.dtype)))
        logits[:, np.arange(20) != 5] = -np.inf
        return logits

    results = generate(
        ToyDecoder(tmp_path), [PROMPT, [9]], max_new_tokens=2, logits_processor=[only_five], logprobs=True
    )
    assert [ids for ids, _, _ in seen] == [[PROMPT], [[9]], [[*PROMPT, 5]], [[9, 5]]]
    assert {shape for _, shape, _ in seen} == {(1, 20)}
    assert seen[0][2] == (np.int64, np.float32)
    assert [one.token_ids for one in results] == [(5, 5), (5, 5)]
    # Of the model's own logits: it did not choose five.
    assert results[0].logprobs == pytest.approx([-np.log(19 + np.e)] * 2)


def test_log_probabilities_on_request(tmp_path: Path) -> None:
    options: Any = {"max_new_tokens": 3, "do_sample": True, "seed": 1, "temperature": 0.1, "repetition_penalty": 3.0}
    result = generate(ToyDecoder(tmp_path), PROMPT, logprobs=True, **options)
    assert result.logprobs == pytest.approx([1 - np.log(19 + np.e)] * 3, abs=1e-12)
    assert generate(ToyDecoder(tmp_path), PROMPT, **options).logprobs is None
