"""The vectors of `embed` are held against those of sentence-transformers, from the text to the last module."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks import fakes
from tests.exporter.models import write_json
from tests.exporter.source.test_tokenizer import write_words
from tests.marks import slow
from tests.models import seeded, traced_here

import pipeload
from pipeload.cli.report import parity_report
from pipeload.errors import ExportError, RunError, ShardError
from pipeload.format.manifest import FileRecord, Manifest, read
from pipeload.tasks.embed import embed as embedding
from pipeload.tasks.embed import modules as modules_of_embed
from pipeload.tasks.text.tokenizer import Tokenizer
from pipeload_export import export, verify
from pipeload_export.check import vectors

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_BERT = {**_SIZES, "vocab_size": 120, "max_position_embeddings": 64, "initializer_range": 0.3}
_PROMPTS = {"prompts": {"query": "find: ", "document": "", "passage": "text: "}, "default_prompt_name": "passage"}
_LONGEST = 24


def write_modules(folder: Path, *kinds: str, package: str = "sentence_transformers.models") -> None:
    """modules.json, and the folder of each module; weights from a seed."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    listed = []
    for number, kind in enumerate(kinds):
        path = f"{number}_{kind}" if number else ""
        listed.append({"idx": number, "name": str(number), "path": path, "type": f"{package}.{kind}"})
        (folder / path).mkdir(exist_ok=True)
        if kind == "Dense":
            settings = {"in_features": 32, "out_features": 16, "bias": True}
            write_json(folder / path / "config.json", settings | {"activation_function": "torch.nn.Tanh"})
            weights = {"linear.weight": (16, 32), "linear.bias": (16,)}
        elif kind == "LayerNorm":
            write_json(folder / path / "config.json", {"dimension": 32})
            weights = {"norm.weight": (32,), "norm.bias": (32,)}
        else:
            continue
        values = {name: random.standard_normal(shape).astype(np.float32) / 4 for name, shape in weights.items()}
        save_file(values, folder / path / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(listed))


def write_sentences(folder: Path, *kinds: str, **pooling: Any) -> Path:
    """A checkpoint of sentence-transformers."""
    write_words(folder, do_lower_case=False)
    seeded("BertModel", "BertConfig", _BERT).save_pretrained(folder)
    write_modules(folder, "Transformer", "Pooling", *kinds)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **pooling})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": _LONGEST, "do_lower_case": True})
    write_json(folder / "config_sentence_transformers.json", _PROMPTS)
    return folder


def exported(source: Path, target: Path, **options: Any) -> Manifest:
    with traced_here():
        return export(source, target, **options)


@pytest.mark.parametrize(
    ("kinds", "mode", "width"),
    [
        (("Dense", "Normalize"), "pooling_mode_mean_tokens", 16),
        slow(("LayerNorm",), "pooling_mode_cls_token", 32),
        slow(("Dropout", "Dense"), "pooling_mode_weightedmean_tokens", 16),
        slow((), "pooling_mode_lasttoken", 32),
        slow(("Normalize",), "pooling_mode_max_tokens", 32),
    ],
)
def test_right_vectors_are_recorded(tmp_path: Path, kinds: tuple[str, ...], mode: str, width: int) -> None:
    source = write_sentences(tmp_path / "source", *kinds, **{mode: True})
    exported(source, tmp_path / "target")
    parity = read(tmp_path / "target").parity
    assert parity is not None
    assert parity.vectors is not None
    assert (parity.vectors.longest, parity.vectors.cut) == (_LONGEST, True), "a text above the longest is compared too"
    assert parity.vectors.cases == (
        "1 short text without a prompt",
        "1 long text without a prompt",
        "3 texts of several lengths without a prompt",
        "2 texts with the default prompt",
        "2 texts with the prompt 'passage'",
        "2 texts with the prompt 'query'",
    )
    assert parity.vectors.difference.max_rel_error < 1e-5
    assert "sentence-transformers" in parity.versions
    report = parity_report(parity)
    assert re.search(r"^  embed +\d\.\d+e-\d\d ", report, re.M), "as `inspect` prints it"
    assert f"vectors of 6 calls of embed with texts of up to {_LONGEST} tokens, cut there; " in report
    with pipeload.load(tmp_path / "target") as model:
        assert model.embed("a cat").shape == (width,)


def test_vectors_of_rounded_weights_are_reported_not_refused(tmp_path: Path) -> None:
    source = write_sentences(tmp_path / "source", "Normalize", pooling_mode_mean_tokens=True)
    exported(source, tmp_path / "target", weights="int4")
    parity = read(tmp_path / "target").parity
    assert parity is not None
    assert parity.vectors is not None
    assert 1e-4 < parity.vectors.difference.max_rel_error < parity.vectors.difference.limit


def _without(kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The engine leaves a module out."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        steps = modules_of_embed.steps

        def fewer(files: Any, modules: Any) -> Any:
            return steps(files, [module for module in modules if module.kind != kind])

        monkeypatch.setattr(embedding, "steps", fewer)

    return plant


def _with_another_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = embedding.pool
    monkeypatch.setattr(embedding, "pool", lambda tokens, mask, _: pool(tokens, mask, ("max",)))


def _with_padding_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = embedding.pool
    monkeypatch.setattr(embedding, "pool", lambda tokens, mask, modes: pool(tokens, np.ones_like(mask), modes))


def _without_lower_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding._Recipe, "prepare", lambda _, prompt, text: (prompt + text).strip())


def _without_default_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = embedding._Recipe.chosen_prompt
    monkeypatch.setattr(
        embedding._Recipe,
        "chosen_prompt",
        lambda self, prompt, name: chosen(self, prompt if name or prompt else "", name),
    )


def _cut_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Tokenizer._take

    def longer(self: Tokenizer, settings: Any, sentence: Any, config: Any, task: str) -> None:
        take(self, settings, type(sentence)(max_seq_length=_LONGEST + 1), config, task)

    monkeypatch.setattr(Tokenizer, "_take", longer)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (_without("Dense"), r"for 1 short text without a prompt they are \[1, 32\] instead of \[1, 16\]"),
        (_without("Normalize"), r"'a cat'\) differs by .* of their range.* has the length [\d.]+ instead of 1; "),
        (_with_another_pooling, "for 1 short text without a prompt, that of text 1"),
        slow(_with_padding_in_the_mean, r"for 3 texts of several lengths.*; those for 1 short .*; 1 long .* are equal"),
        slow(_without_lower_case, "for 3 texts of several lengths without a prompt, that of text 3"),
        slow(_without_default_prompt, "for 2 texts with the default prompt, that of text 1"),
        slow(_cut_elsewhere, "for 1 long text without a prompt, that of text 1"),
    ],
)
def test_a_step_that_is_left_out_or_swapped_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], said: str
) -> None:
    source = write_sentences(tmp_path / "source", "Dense", "Normalize", pooling_mode_mean_tokens=True)
    plant(monkeypatch)
    with pytest.raises(ExportError, match=said) as caught:
        exported(source, tmp_path / "target")
    assert "modules.json names Transformer, Pooling, Dense, Normalize" in str(caught.value)
    assert not (tmp_path / "target").exists()


@slow
def test_a_child_makes_the_vectors_and_verify_compares_them_later(tmp_path: Path) -> None:
    source = write_sentences(tmp_path / "source", "Dense", pooling_mode_mean_tokens=True)
    parity = export(source, tmp_path / "target").parity
    report = verify(tmp_path / "target", source=source)
    assert parity is not None
    assert parity.vectors is not None
    assert report.parity == parity
    assert "embed makes the vectors of sentence-transformers" in report.checks
    write_modules(source, "Transformer", "Pooling", "Normalize")
    with pytest.raises(ExportError, match=r"The vectors of embed are not .* Export it from this source again"):
        verify(tmp_path / "target", source=source)


def test_what_keeps_vectors_from_being_compared_is_said_and_recorded_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_sentences(tmp_path / "source", pooling_mode_mean_tokens=True)
    monkeypatch.setattr(vectors, "has_module", lambda name: name != "sentence_transformers")
    said = r"were not compared with those of sentence-transformers: it is not installed.*\.\[sentence\]"
    with pytest.warns(pipeload.EmbeddingWarning, match=said):
        found = exported(source, tmp_path / "target")
    assert found.parity is not None
    assert found.parity.vectors is None
    assert "sentence-transformers" not in found.parity.versions
    with traced_here():
        skipped = verify(tmp_path / "target", source=source).skipped
    assert any("vectors with those of sentence-transformers: it is not installed" in one for one in skipped)


def test_texts_are_not_needed(tmp_path: Path) -> None:
    source = write_sentences(tmp_path / "source", pooling_mode_mean_tokens=True)
    (source / "vocab.txt").unlink()
    found = exported(source, tmp_path / "target")
    assert found.parity is not None
    assert found.parity.vectors is None


def test_code_of_the_checkpoint_is_not_run_for_the_comparison(tmp_path: Path) -> None:
    """sentence-transformers imports a module from a local folder without being asked to."""
    source = write_sentences(tmp_path / "source", pooling_mode_mean_tokens=True)
    write_modules(source, "Transformer", "Pooling", package="own")
    (source / "own.py").write_text("raise SystemExit('the code of the checkpoint was run')")
    with pytest.warns(pipeload.EmbeddingWarning, match=r"names 'own\.Transformer', .*--trust-remote-code"):
        found = exported(source, tmp_path / "target")
    assert found.parity is not None
    assert found.parity.vectors is None


def test_a_directory_of_before_has_no_vectors(tmp_path: Path) -> None:
    source = write_sentences(tmp_path / "source", pooling_mode_mean_tokens=True)
    (source / "modules.json").unlink()
    exported(source, tmp_path / "target")
    path = tmp_path / "target" / "pipeload.json"
    kept = json.loads(path.read_bytes())
    del kept["parity"]["vectors"]
    path.write_text(json.dumps(kept))
    parity = read(tmp_path / "target").parity
    assert parity is not None
    assert parity.vectors is None


def test_only_a_model_that_embed_refuses_makes_no_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file, or a process without memory, says nothing of the model: verify would have found it in order."""
    write_modules(tmp_path, "Transformer", "Pooling", "Normalize")
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    write_words(tmp_path, do_lower_case=False)
    shape = {"last_hidden_state": ("batch_size", "sequence_length", 32)}
    listed = [FileRecord(path=name, nbytes=0, sha256="") for name in (vectors.MODULES, "tokenizer.json")]
    found = replace(fakes.manifest("feature-extraction", outputs=shape), files=tuple(listed))
    assert vectors.makes_vectors(tmp_path, found)
    write_modules(tmp_path, "Transformer", "Pooling", "WordWeights")
    assert not vectors.makes_vectors(tmp_path, found)
    (tmp_path / vectors.MODULES).write_text("[{")
    with pytest.raises(ShardError, match="damaged"):
        vectors.makes_vectors(tmp_path, found)

    def short(_: object) -> None:
        raise RunError("The process has no memory left.")

    monkeypatch.setattr(vectors, "check_embed", short)
    with pytest.raises(RunError):
        vectors.makes_vectors(tmp_path, found)
