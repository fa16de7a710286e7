"""A model's own files are those that were exported: a missing or changed file is an error, and no other answer."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks.fakes import ToyDecoder, ToyRunner, manifest, write_bert_tokenizer, write_json

from pipeload.errors import ShardError
from pipeload.format.manifest import FileRecord
from pipeload.tasks.chat.chat import chat_prompt
from pipeload.tasks.classify.classify import classify
from pipeload.tasks.embed.embed import embed
from pipeload.tasks.generate.generate import generate

pytest.importorskip("tokenizers")

FILES = {
    "config.json": {"model_type": "bert"},
    "modules.json": [{"type": "sentence_transformers.models.Normalize"}],
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
    "sentence_bert_config.json": {"max_seq_length": 9},
    "config_sentence_transformers.json": {},
    "generation_config.json": {"max_new_tokens": 2},
    "preprocessor_config.json": {"size": 4},
}
SETTINGS = ["tokenizer.json", "tokenizer_config.json"]


def _listed(directory: Path, model: Any) -> Any:
    """The model, whose manifest lists the files of its directory."""
    write_bert_tokenizer(directory, chat_template="{{ messages[0].content }}")
    for name, content in FILES.items():
        write_json(directory, name, content)
    records = []
    for path in sorted(one for one in directory.rglob("*") if one.is_file()):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        records.append(FileRecord(path=str(path.relative_to(directory)), nbytes=len(data), sha256=digest))
    model.manifest = replace(model.manifest, files=tuple(records))
    return model


def _embed(directory: Path) -> None:
    outputs = {"last_hidden_state": ("batch_size", "sequence_length", 2)}
    made = lambda inputs: {"last_hidden_state": np.ones((*inputs["input_ids"].shape, 2), np.float32)}  # noqa: E731
    embed(_listed(directory, ToyRunner(directory, manifest("feature-extraction", outputs=outputs), made)), "the cat")


def _images(directory: Path) -> None:
    pytest.importorskip("PIL")
    made = lambda inputs: {"logits": np.ones((len(inputs["pixel_values"]), 2), np.float32)}  # noqa: E731
    runner = ToyRunner(directory, manifest("image-classification", ("pixel_values",), dtype="float32"), made)
    classify(_listed(directory, runner), np.zeros((5, 5, 3), np.uint8))


def _generate(directory: Path) -> None:
    generate(_listed(directory, ToyDecoder(directory)), "the")


def _chat(directory: Path) -> None:
    pytest.importorskip("jinja2")
    chat_prompt(_listed(directory, ToyDecoder(directory)), [{"role": "user", "content": "the"}])


CASES = [
    *((_embed, name) for name in [*SETTINGS, *list(FILES)[:5]]),
    (_images, "config.json"),
    (_images, "preprocessor_config.json"),
    (_generate, "generation_config.json"),
    (_generate, "tokenizer.json"),
    (_chat, "tokenizer_config.json"),
]


def _change(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize(("use", "name"), CASES, ids=[f"{use.__name__}-{name}" for use, name in CASES])
@pytest.mark.parametrize("harm", [Path.unlink, _change, _pipe, _endless, _circle], ids=lambda harm: harm.__name__)
def test_a_listed_file_that_is_not_the_exported_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Any, name: str, harm: Any
) -> None:
    use(tmp_path)
    whole = _listed

    def harmed(directory: Path, model: Any) -> Any:
        made = whole(directory, model)
        harm(directory / name)
        return made

    monkeypatch.setitem(globals(), "_listed", harmed)
    with pytest.raises(ShardError, match=rf"'{name}' "):
        use(tmp_path)


def test_the_generation_settings_are_read_once(tmp_path: Path) -> None:
    model = _listed(tmp_path, ToyDecoder(tmp_path))
    assert len(generate(model, "the").token_ids) == 2
    (tmp_path / "generation_config.json").unlink()
    assert len(generate(model, "the").token_ids) == 2
