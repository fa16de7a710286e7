from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.tasks.fakes import ToyDecoder, write_bert_tokenizer, write_gpt_tokenizer

from pipeload.errors import ConfigError
from pipeload.tasks.generate.generate import Generation, generate
from pipeload.tasks.generate.stopping import StopStrings
from pipeload.tasks.text.tokenizer import tokenizer_of

pytest.importorskip("tokenizers")

TEXT = "The capital of France is Zwölf 🙂 日本語."


def _generate(directory: Path, ids: list[int], stop_strings: list[str]) -> Generation:
    model = ToyDecoder(directory, script=ids)
    model.vocabulary = 300
    result = generate(model, "café", max_new_tokens=len(ids), stop_strings=stop_strings)
    assert len(model.steps) == len(result.token_ids), "steps after the end"
    return result


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9, len(TEXT)])
def test_a_stop_string_ends_the_text_wherever_it_lies(tmp_path: Path, length: int) -> None:
    write_gpt_tokenizer(tmp_path)
    tokenizer = tokenizer_of(ToyDecoder(tmp_path))
    ids = list(tokenizer.encode(TEXT).ids)
    # Bytes of a character that is not complete are no text yet.
    prefixes = [tokenizer.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}") for count in range(len(ids) + 1)]
    for begin in range(len(TEXT) - length + 1):
        stop = TEXT[begin : begin + length]
        result = _generate(tmp_path, ids, ["not there", stop])
        count = next(count for count, prefix in enumerate(prefixes) if stop in prefix)
        assert (result.token_ids, result.finish_reason) == (tuple(ids[:count]), "stop"), stop
        assert result.text == tokenizer.decode(ids[:count])
        assert stop in result.text


def test_a_stop_string_that_ends_inside_a_token(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    result = generate(ToyDecoder(tmp_path, script=[5, 7, 8, 9]), "cat", max_new_tokens=4, stop_strings="dog s")
    assert (result.text, result.finish_reason) == (" the dog sat", "stop")


def test_text_before_an_unfinished_character_counts(tmp_path: Path) -> None:
    write_gpt_tokenizer(tmp_path)
    tokenizer = tokenizer_of(ToyDecoder(tmp_path))
    stops = StopStrings(["xy"], tokenizer, [])
    parrot = list(tokenizer.encode("y🦜").ids)
    letter = tokenizer.encode("x").ids[0]
    assert not stops.push(letter)
    assert stops.push(parrot[0])
    again = StopStrings(["🦜x"], tokenizer, [])
    assert [again.push(id_) for id_ in [*parrot, letter]] == [False] * len(parrot) + [True]


def test_the_prompt_does_not_count(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    result = generate(ToyDecoder(tmp_path, script=[8, 7]), "cat", max_new_tokens=2, stop_strings=["cat sat", "cat"])
    assert (result.text, result.finish_reason) == (" sat dog", "length")


def test_special_tokens_count_as_they_are_written(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    result = generate(ToyDecoder(tmp_path, script=[7, 4, 8]), "cat", max_new_tokens=3, stop_strings=["[MASK]"])
    assert (result.token_ids, result.text, result.finish_reason) == ((7, 4), " dog", "stop")


def test_special_tokens_do_not_hide_a_stop_string(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    result = generate(ToyDecoder(tmp_path, script=[7, 4, 11, 8]), "cat", max_new_tokens=4, stop_strings="dogs")
    assert (result.token_ids, result.text, result.finish_reason) == ((7, 4, 11), " dogs", "stop")


def test_the_model_may_end_the_text_at_a_stop_string(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    model = ToyDecoder(tmp_path, script=[7, 8])
    assert generate(model, "cat", eos_token_id=7, stop_strings="dog").finish_reason == "eos"
    model = ToyDecoder(tmp_path, script=[7, 8])
    assert generate(model, "cat", max_new_tokens=1, stop_strings="dog").finish_reason == "stop"


def test_each_sequence_stops_by_itself(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    first, *others = [one.text or "" for one in generate(ToyDecoder(tmp_path), prompts, max_new_tokens=12)]
    stop = next(word for text in others for word in text.split() if word not in first)
    alone = [generate(ToyDecoder(tmp_path), one, max_new_tokens=12, stop_strings=stop) for one in prompts]
    assert generate(ToyDecoder(tmp_path), prompts, max_new_tokens=12, stop_strings=stop) == alone
    assert {one.finish_reason for one in alone} == {"stop", "length"}


def test_stop_strings_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        generate(ToyDecoder(tmp_path), [3], stop_strings=["a"])
