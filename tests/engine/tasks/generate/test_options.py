from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks.fakes import ToyDecoder, write_json

from pipeload.errors import ConfigError, ShardError
from pipeload.tasks.generate.generate import generate
from pipeload.tasks.generate.options import GenerationOptions, check_call, generation_settings, lookup_tokens
from pipeload.tasks.model_files import GenerationConfig
from pipeload.tasks.runner import generation_config_of


def _settings(directory: Path, options: Any) -> GenerationConfig:
    return generation_settings(generation_config_of(ToyDecoder(directory)), options)


def test_without_a_file_the_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    config = pytest.importorskip("transformers").GenerationConfig()
    settings = _settings(tmp_path, {})
    # max_length is 20 there, which no file says and nobody wants.
    for name in set(GenerationConfig.__struct_fields__) - {"max_length", "not_applied", "names_ends"}:
        assert getattr(settings, name) == getattr(config, name), name
    assert settings.token_limit == 64


def test_the_file_decides_and_an_argument_wins(tmp_path: Path) -> None:
    file = {"do_sample": True, "temperature": 0.6, "top_k": None, "top_p": 0.9, "max_new_tokens": 7, "eos_token_id": 3}
    write_json(tmp_path, "generation_config.json", file | {"num_beams": 4, "stop_strings": "END"})
    settings = _settings(tmp_path, {"top_p": 0.5, "temperature": None, "eos_token_id": []})
    assert settings == GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=None,
        top_p=0.5,
        max_new_tokens=7,
        eos_token_id=[],
        stop_strings=["END"],
        not_applied=("num_beams",),
        names_ends=True,
    )
    assert not _settings(tmp_path, {"do_sample": False}).do_sample


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    given = {"do_sample": np.True_, "temperature": np.float64(0.5), "top_k": np.int64(3), "eos_token_id": np.int32(4)}
    settings = _settings(tmp_path, given)
    assert (settings.do_sample, settings.top_k, settings.eos_token_id) == (True, 3, [4])
    assert type(settings.temperature) is float


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens must be a whole number from 1 on, not 0\."),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number from 1 on, not 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number from 1 on, not True"),
        ({"min_new_tokens": -1}, "min_new_tokens must be a whole number from 0 on, not -1"),
        (
            {"min_new_tokens": 9, "max_new_tokens": 8},
            r"min_new_tokens is 9, more than the 8 of max_new_tokens\. Lower it, or raise max_new_tokens\.",
        ),
        ({"do_sample": "yes"}, "do_sample must be True or False, not 'yes'"),
        (
            {"do_sample": True, "temperature": -1},
            r"temperature must be a number from 0 on \(0 takes the likeliest token each time\), not -1\.",
        ),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be a number from 0 on .* not nan"),
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number from 0 on .* not 'hot'"),
        ({"do_sample": True, "top_k": -1}, r"top_k must be a whole number from 0 on \(0 keeps all tokens\), not -1"),
        ({"do_sample": True, "top_p": 1.1}, r"top_p must be a number from 0 to 1 \(1 keeps all tokens\), not 1.1"),
        ({"do_sample": True, "min_p": -0.1}, r"min_p must be a number from 0 to 1 \(0 keeps all tokens\), not -0.1"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be a number above 0 \(1 changes nothing"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be a number above 0 .* not -1.0"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size must be a whole number from 0 on .* not -2"),
        ({"stop_strings": ""}, r"stop_strings must be a text or a sequence of texts, none of them empty, not \[''\]"),
        ({"stop_strings": ["a", 3]}, "stop_strings must be a text or a sequence"),
        ({"eos_token_id": -1}, r"eos_token_id must be a token id or a sequence of token ids, none below 0, not \[-1\]"),
        ({"eos_token_id": ["a"]}, "eos_token_id must be a token id or a sequence"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _settings(tmp_path, arguments)


def test_temperature_0_is_greedy(tmp_path: Path) -> None:
    assert _settings(tmp_path, {"do_sample": True, "temperature": 0}).do_sample is False
    assert _settings(tmp_path, {"temperature": 0.0}).do_sample is False
    with pytest.raises(ConfigError, match="do_sample must be True or False"):
        _settings(tmp_path, {"do_sample": "yes", "temperature": 0})


def test_an_option_that_nothing_uses_is_named(tmp_path: Path) -> None:
    """A sampling option without do_sample gave greedy text without a word."""
    model = ToyDecoder(tmp_path)
    for name, value in (("temperature", 5.0), ("top_k", 3), ("top_p", 0.5), ("min_p", 0.1)):
        with pytest.warns(UserWarning, match=f"{name} is {value} and has no effect.* Pass do_sample=True") as caught:
            generate(model, [1, 2], max_new_tokens=1, seed=1, **{name: value})  # type: ignore[misc]
        assert caught[0].filename == __file__
        generate(model, [1, 2], max_new_tokens=1, do_sample=True, **{name: value})  # type: ignore[misc]
    # These change nothing, greedy or not.
    generate(model, [1, 2], max_new_tokens=1, temperature=0, top_p=0.5)
    generate(model, [1, 2], max_new_tokens=1, temperature=1.0, top_k=50, top_p=1.0, min_p=None)


def test_greedy_generation_does_not_look_at_what_only_sampling_takes(tmp_path: Path) -> None:
    assert _settings(tmp_path, {"temperature": 0.0, "top_k": -1, "top_p": 7}).temperature == 0


def test_a_file_that_cannot_work_is_refused_too(tmp_path: Path) -> None:
    write_json(tmp_path, "generation_config.json", {"do_sample": True, "temperature": -1.0})
    with pytest.raises(ConfigError, match="temperature must be a number from 0 on"):
        _settings(tmp_path, {})
    write_json(tmp_path, "generation_config.json", {"top_k": "many"})
    with pytest.raises(ShardError, match="damaged"):
        _settings(tmp_path, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number from 1 on, not 0"),
        ({"num_return_sequences": 2}, r"num_return_sequences is 2, but without sampling .* Pass do_sample=True"),
        ({"seed": -1}, "seed must be a whole number from 0 on, not -1"),
        ({"seed": 1.5}, "seed must be a whole number from 0 on, not 1.5"),
        ({"logits_processor": print}, "logits_processor must be a sequence of callables, not <built-in"),
        ({"logits_processor": [3]}, r"logits_processor must be a sequence of callables, not \[3\]"),
        ({"assistant_model": "small"}, "assistant_model must be a model from pipeload.load, not 'small'"),
        ({"streamer": "file"}, "streamer must be a callable that takes a text, or a TextStream, not 'file'"),
    ],
)
def test_arguments_of_the_call_are_checked(arguments: dict[str, Any], message: str) -> None:
    check_call(GenerationConfig(), {}, None, 1, 0)
    copies = arguments.pop("num_return_sequences", None)
    with pytest.raises(ConfigError, match=message):
        check_call(GenerationConfig(), arguments, copies, 1, 0)  # type: ignore[arg-type]


def test_guesses_that_only_a_file_asks_for_are_for_calls_that_can_have_them(tmp_path: Path) -> None:
    write_json(tmp_path, "generation_config.json", {"prompt_lookup_num_tokens": 5})
    settings = _settings(tmp_path, {})
    assert lookup_tokens(settings, {}, 1) == 5
    assert lookup_tokens(settings, {}, 2) == 0
    off: GenerationOptions = {"prompt_lookup_num_tokens": 0}
    assert lookup_tokens(_settings(tmp_path, off), off, 1) == 0
    asked: GenerationOptions = {"prompt_lookup_num_tokens": 3}
    assert lookup_tokens(_settings(tmp_path, asked), asked, 2) == 3
