"""`pipeload generate`: texts, options, wrong usage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.engine.cli.toy_models import Call
from tests.engine.tasks.fakes import ToyDecoder, write_bert_tokenizer, write_json

from pipeload.tasks.generate.generate import Generation

pytest.importorskip("tokenizers")


def test_generate_prints_the_text_and_its_continuation(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    result = call(ToyDecoder(tmp_path, script=[8, 9, 7]), "generate", "the cat", "--max-new-tokens", "3")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "the cat sat on dog\n", "")


def test_generate_prints_json(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    write_json(tmp_path, "config.json", {"eos_token_id": 9})
    result = call(ToyDecoder(tmp_path, script=[8, 9]), "generate", "-", "--json", stdin="the cat\n")
    assert json.loads(result.stdout) == {
        "prompt": "the cat",
        "text": " sat on",
        "token_ids": [8, 9],
        "prompt_tokens": 4,
        "finish_reason": "eos",
        "logprobs": None,
        "top_logprobs": None,
        "sweeps": 2,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
    }


def test_generate_takes_every_option(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def keep(model: Any, prompt: str, **options: Any) -> Generation:
        seen.update(options)
        return Generation(
            text=" sat", token_ids=(8,), prompt_tokens=4, finish_reason="stop", logprobs=(-0.5,), sweeps=1
        )

    monkeypatch.setattr("pipeload.cli.commands.generate.generate_text", keep)
    numbers = ["--max-new-tokens=9", "--min-new-tokens=2", "--top-k=3", "--no-repeat-ngram-size=4", "--seed=5"]
    shares = ["--temperature=0.5", "--top-p=0.9", "--min-p=0.1", "--repetition-penalty=1.2"]
    rest = ["--sample", "--stop=.", "--stop", "the end", "--lookup=6", "--logprobs", "--json"]
    result = call(ToyDecoder(tmp_path), "generate", "the cat", *numbers, *shares, *rest)
    assert json.loads(result.stdout)["logprobs"] == [-0.5]
    assert seen == {
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 4,
        "stop_strings": [".", "the end"],
        "seed": 5,
        "prompt_lookup_num_tokens": 6,
        "logprobs": True,
    }
    call(ToyDecoder(tmp_path), "generate", "the cat", "--json", "--greedy")
    assert seen.pop("do_sample") is False
    assert seen.pop("logprobs") is False
    assert set(seen.values()) == {None}


def test_generate_tells_how_many_guesses_were_right(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    result = call(ToyDecoder(tmp_path), "generate", "the the the", "--max-new-tokens=3", "--lookup=2", "--stats")
    assert re.match(r"3 tokens in [23] sweeps; \d of [1-9] guesses were right\n", result.stderr), result.stderr


def test_generate_takes_a_draft_model(tmp_path: Path, call: Call, loads: list[tuple[Any, ...]]) -> None:
    write_bert_tokenizer(tmp_path)
    arguments = ("generate", "the cat", "--max-new-tokens=5", "--budget=1GB")
    alone = call(ToyDecoder(tmp_path), *arguments)
    made = call(ToyDecoder(tmp_path), *arguments, "--draft", str(tmp_path))
    assert (made.exit_code, made.stdout) == (0, alone.stdout)
    assert [load[:2] for load in loads[1:]] == [(tmp_path, "1GB"), (tmp_path, "1GB")]


def test_generate_samples_the_same_text_for_the_same_seed(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    arguments = ("generate", "the cat", "--sample", "--seed=1", "--max-new-tokens=5")
    one = call(ToyDecoder(tmp_path), *arguments)
    assert (one.exit_code, one.stderr) == (0, "")
    assert call(ToyDecoder(tmp_path), *arguments).stdout == one.stdout
    assert call(ToyDecoder(tmp_path), *arguments[:3], "--seed=2", arguments[4]).stdout != one.stdout


def test_generate_ends_after_a_stop_string(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    result = call(ToyDecoder(tmp_path, script=[8, 9, 7]), "generate", "the cat", "--stop", "t on")
    assert result.stdout == "the cat sat on\n"


def test_generate_makes_several_texts(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    arguments = ("generate", "the cat", "--sample", "--seed=1", "--max-new-tokens=4", "--num-return-sequences=3")
    texts = call(ToyDecoder(tmp_path), *arguments).stdout.rstrip("\n").split("\n\n")
    assert len(set(texts)) == 3
    facts = json.loads(call(ToyDecoder(tmp_path), *arguments, "--json").stdout)
    assert [fact["prompt"] + fact["text"] for fact in facts] == texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--logprobs"], "--logprobs needs --json."),
        (["--greedy", "--top-k=3"], "--top-k samples, and --greedy does not. Leave one of them out."),
        (["--top-p=1.5"], "Invalid value for '--top-p'"),
        (["--max-new-tokens=0"], "Invalid value for '--max-new-tokens'"),
        (["--num-return-sequences=0"], "Invalid value for '--num-return-sequences'"),
    ],
)
def test_generate_refuses_wrong_usage(tmp_path: Path, call: Call, arguments: list[str], message: str) -> None:
    result = call(ToyDecoder(tmp_path), "generate", "the cat", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_an_option_of_sampling_samples(tmp_path: Path, call: Call) -> None:
    """`--temperature 5 --seed 1` without `--sample` gave the greedy text without a word."""
    write_bert_tokenizer(tmp_path)
    arguments = ("generate", "the cat", "--seed=1", "--max-new-tokens=5")
    greedy = call(ToyDecoder(tmp_path), *arguments).stdout
    for option in ("--temperature=5", "--top-k=10", "--top-p=0.99", "--min-p=0.01"):
        sampled = call(ToyDecoder(tmp_path), *arguments, "--sample", option)
        assert call(ToyDecoder(tmp_path), *arguments, option).stdout == sampled.stdout
        assert sampled.stderr == ""
    assert call(ToyDecoder(tmp_path), *arguments, "--temperature=5").stdout != greedy
    for zero in (["--temperature=0"], ["--sample", "--temperature=0", "--top-k=3"]):
        result = call(ToyDecoder(tmp_path), *arguments, *zero)
        assert (result.stdout, result.stderr) == (greedy, "")


def test_generate_without_new_text_prints_the_prompt(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    write_json(tmp_path, "config.json", {"eos_token_id": 3})
    assert call(ToyDecoder(tmp_path, script=[3]), "generate", "the cat").stdout == "the cat\n"
