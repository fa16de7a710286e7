"""Mistakes of callers, and exceptions of libraries about a model's files, are errors of pipeload with their cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks.fakes import (
    ToyDecoder,
    ToyRunner,
    files_in,
    manifest,
    write_bert_tokenizer,
    write_gpt_tokenizer,
    write_json,
)

from pipeload.errors import ConfigError, PipeloadError, RunError, ShardError
from pipeload.tasks.classify.classify import classify
from pipeload.tasks.embed.embed import embed
from pipeload.tasks.generate.generate import generate
from pipeload.tasks.images import ImageProcessor
from pipeload.tasks.model_files import ModelConfig
from pipeload.tasks.text.tokenizer import tokenizer_of

pytest.importorskip("tokenizers")


def _encoder(directory: Path, shape: tuple[int, ...] = (2,)) -> ToyRunner:
    write_bert_tokenizer(directory)
    return ToyRunner(
        directory,
        manifest("feature-extraction", outputs={"last_hidden_state": ("batch_size", "sequence_length", 2)}),
        lambda inputs: {"last_hidden_state": np.ones((*inputs["input_ids"].shape, *shape), np.float32)},
    )


def _classifier(directory: Path, task: str, shape: Callable[[Any], tuple[int, ...]]) -> ToyRunner:
    write_bert_tokenizer(directory)
    return ToyRunner(
        directory, manifest(task), lambda inputs: {"logits": np.ones(shape(inputs["input_ids"].shape), np.float32)}
    )


@pytest.mark.parametrize(
    "texts", [None, 5, 1.5, True, object(), {"a": 1}, {"a"}, b"a", bytearray(b"a"), np.array("a"), iter(["a"])]
)
def test_texts_are_a_string_or_a_sequence(tmp_path: Path, texts: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^Texts must be a string or a sequence of strings, not .*: .*\. Put them into"
    ):
        embed(_encoder(tmp_path), texts)


@pytest.mark.parametrize("texts", [["the cat", "a dog"], ("the cat", "a dog"), np.array(["the cat", "a dog"])])
def test_any_sequence_of_texts_will_do(tmp_path: Path, texts: Any) -> None:
    assert embed(_encoder(tmp_path), texts).shape == (2, 2)


@pytest.mark.parametrize("number", ["3", 2.5, [1], float("nan"), {}, None])
def test_counts_are_whole_numbers(tmp_path: Path, number: Any) -> None:
    encoder = _encoder(tmp_path)
    classifier = _classifier(tmp_path, "text-classification", lambda shape: (shape[0], 3))
    with pytest.raises(ConfigError, match="batch_size must be a whole number from 1 on, not "):
        embed(encoder, ["a"], batch_size=number)
    with pytest.raises(ConfigError, match="batch_size must be a whole number from 1 on, not "):
        classify(classifier, ["a"], batch_size=number)
    if number is not None:
        with pytest.raises(ConfigError, match="top_k must be a whole number from 1 on, not "):
            classify(classifier, ["a"], top_k=number)


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_numbers_beyond_any_float_are_refused(tmp_path: Path, value: int) -> None:
    write_gpt_tokenizer(tmp_path)
    for name in ("temperature", "repetition_penalty", "top_p", "min_p"):
        with pytest.raises(ConfigError, match=f"{name} must be a number"):
            generate(ToyDecoder(tmp_path), [1], do_sample=True, **{name: value})


def test_a_tokenizer_without_its_unknown_token_is_named(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path)
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text())
    del state["model"]["vocab"]["[UNK]"]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "[UNK]"]
    path.write_text(json.dumps(state))
    with pytest.raises(
        ShardError, match=r"tokenizer\.json cannot turn a text into tokens: .*\. Export the model"
    ) as raised:
        embed(encoder, "zebra")
    assert raised.value.__cause__ is not None


def test_a_panic_of_the_tokenizer_is_an_error(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    tokenizer = tokenizer_of(ToyRunner(tmp_path, manifest("feature-extraction"), dict))

    class PanicException(BaseException):
        pass

    PanicException.__module__ = "pyo3_runtime"

    class Panics:
        def __getattr__(self, name: str) -> Any:
            raise PanicException("index out of bounds")

    tokenizer._backend = Panics()
    for use in (
        lambda: tokenizer.encode("a"),
        lambda: tokenizer.decode([1]),
        lambda: tokenizer.token(1),
        lambda: tokenizer.join(["a"]),
        lambda: tokenizer.vocabulary_digest(),
    ):
        with pytest.raises(ShardError, match=r"tokenizer\.json .*: index out of bounds\. Export the model again\.$"):
            use()


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        ("text-classification", lambda _: ()),
        ("text-classification", lambda shape: (shape[0] + 1, 3)),
        ("text-classification", lambda shape: (*shape, 3)),
        ("text-classification", lambda shape: (shape[0], 0)),
        ("token-classification", lambda shape: (shape[0], 3)),
        ("token-classification", lambda shape: (shape[0], shape[1] + 1, 3)),
        ("token-classification", lambda shape: (*shape, 0)),
    ],
)
def test_logits_of_another_shape_are_refused(
    tmp_path: Path, task: str, shape: Callable[[Any], tuple[int, ...]]
) -> None:
    runner = _classifier(tmp_path, task, shape)
    with pytest.raises(
        ConfigError, match=r"output 'logits' has the shape \[.*\], which its task cannot use: .* Use model"
    ):
        classify(runner, ["the cat", "a"])


def test_hidden_states_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="output 'last_hidden_state' has the shape"):
        embed(_encoder(tmp_path, (2, 2)), ["the cat", "a"])


def test_a_decoder_makes_logits_of_each_position(tmp_path: Path) -> None:
    decoder = ToyDecoder(tmp_path)
    decoder.manifest = manifest("text-generation", ("input_ids",), {"logits": ("batch_size", 20)}, cached=True)
    with pytest.raises(ConfigError, match=r"first output is \['batch_size', 20\]; generate takes logits"):
        generate(decoder, [1])


def test_a_prompt_outside_the_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No token can be chosen from 20 logits: .* Check that the token ids"):
        generate(ToyDecoder(tmp_path), [1, 2000], repetition_penalty=1.5)


def test_a_processor_that_returns_no_array_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"logits_processor\[0\] returned what is no array: "):
        generate(ToyDecoder(tmp_path), [1], logits_processor=[lambda *_: [[1], [1, 2]]])  # type: ignore[list-item]


class _Own(Exception):  # noqa: N818
    pass


def test_errors_of_the_callers_own_functions_come_back_as_they_are(tmp_path: Path) -> None:
    write_gpt_tokenizer(tmp_path)
    own = _Own()

    def fails(*_: Any) -> Any:
        raise own

    for options in ({"logits_processor": [fails]}, {"streamer": fails}):
        with pytest.raises(_Own) as raised:
            generate(ToyDecoder(tmp_path), "the cat", **options)  # type: ignore[call-overload]
        assert raised.value is own


@pytest.mark.parametrize("data", [b'{"id2label": {"0": 1e999}}', b'{"vocab_size": 1e400}', b"[" * 10**6, b'"\\ud800"'])
def test_json_beyond_what_numbers_and_nesting_can_be_is_damage(tmp_path: Path, data: bytes) -> None:
    encoder = _classifier(tmp_path, "text-classification", lambda shape: (shape[0], 3))
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ShardError, match=r"config\.json is damaged: .*Export the model again") as raised:
        classify(encoder, "the cat")
    assert raised.value.__cause__ is not None


def test_images_that_pillow_cannot_take_are_refused(tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    picture = images.new("RGB", (4, 4))
    picture.close()
    processor = ImageProcessor(files_in(tmp_path), ModelConfig())
    for image in (picture, "\0", "\ud800", b"\x89PNG\r\n\x1a\n" + b"\xff" * 100):
        with pytest.raises(ConfigError, match=r"^The image.* cannot be read: .*\. Pass another"):
            processor.batch([image])


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 10**6},
        {"size": 10**20},
        {"size": {"shortest_edge": 10**400}},
        {"size": 1, "do_center_crop": True, "crop_size": 10**12},
        {"do_resize": False, "do_center_crop": True, "crop_size": [10**12, 1]},
        {"rescale_factor": 10**300, "image_mean": [10**38] * 3, "image_std": 10**-38, "size": [10**9, 1]},
    ],
)
def test_images_are_made_no_larger_than_images_are(tmp_path: Path, settings: dict[str, Any]) -> None:
    pytest.importorskip("PIL")
    write_json(tmp_path, "preprocessor_config.json", settings)
    with pytest.raises(PipeloadError, match=r"preprocessor_config\.json"):
        ImageProcessor(files_in(tmp_path), ModelConfig()).batch([np.zeros((8, 8, 3), np.uint8)])


@pytest.mark.parametrize("function", ["full", "stack"])
def test_a_process_without_memory_for_a_batch_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    encoder, error = _encoder(tmp_path), MemoryError("Unable to allocate 9 GB")

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(np, function, fails)
    with pytest.raises(RunError, match="Unable to allocate 9 GB") as raised:
        embed(encoder, ["the cat", "a dog"])
    assert raised.value.__cause__ is error


def test_a_process_without_memory_for_the_tokens_of_a_text_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bert_tokenizer(tmp_path)
    decoder, error = ToyDecoder(tmp_path, script=[8]), MemoryError("Unable to allocate 9 GB")

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(np, "full", fails)
    with pytest.raises(RunError, match="Unable to allocate 9 GB") as raised:
        generate(decoder, "the cat", max_new_tokens=1)
    assert raised.value.__cause__ is error
