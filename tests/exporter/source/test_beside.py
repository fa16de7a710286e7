"""The tokenizer beside an `.onnx` file is read as transformers reads it, as that of a checkpoint is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.exporter.models import write_json, write_onnx
from tests.exporter.source.test_tokenizer import write_fast, write_merges, write_words
from tests.marks import slow
from tests.models import traced_here

from pipeload.errors import ExportError
from pipeload_export import export
from pipeload_export.source import beside


def _exported(source: Path, target: Path, **options: Any) -> Any:
    """The tokenizer of an export."""
    from tokenizers import Tokenizer

    with traced_here():
        export(source, target, **options)
    return Tokenizer.from_file(str(target / "tokenizer.json"))


@pytest.mark.parametrize(("lower", "tokens"), [(True, ["a", "##b"]), (False, ["A", "##b"])])
@pytest.mark.parametrize("folder", ["m", "m/onnx"])
def test_the_config_beside_it_overrides_the_tokenizer(
    tmp_path: Path, folder: str, lower: bool, tokens: list[str]
) -> None:
    for number, write in enumerate((write_words, write_fast)):
        place = tmp_path / str(number)
        place.mkdir()
        write(place / "m", do_lower_case=lower)
        (place / folder).mkdir(exist_ok=True)
        tokenizer = _exported(write_onnx(place / folder / "model.onnx"), place / "out")
        assert tokenizer.encode("Ab", add_special_tokens=False).tokens == tokens
        assert json.loads((place / "out" / "tokenizer_config.json").read_text())["pad_token"] == "[PAD]"


def test_all_files_that_a_vocabulary_needs_are_read(tmp_path: Path) -> None:
    """Merges make the tokens of a vocabulary, and older models have tokens that were added in a file of their own."""
    folder = write_merges(tmp_path / "m")
    write_json(folder / "added_tokens.json", {"<new>": 258})
    tokenizer = _exported(write_onnx(folder / "model.onnx"), tmp_path / "out")
    assert tokenizer.encode("ab<new>b").tokens == ["ab", "<new>", "b"]


def test_values_of_the_config_that_tell_of_the_graph_hinder_nobody(tmp_path: Path) -> None:
    folder = write_fast(tmp_path / "m")
    config = {"model_type": "bert", "id2label": [1, None], "rope_parameters": "?", "use_magic": True}
    write_json(folder / "config.json", config)
    _exported(write_onnx(folder / "model.onnx"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_a_vocabulary_that_nothing_tells_of_is_left_alone(tmp_path: Path) -> None:
    source = write_onnx(tmp_path / "m" / "model.onnx")
    source.with_name("vocab.txt").write_text("a\nb\n")
    with traced_here():
        export(source, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@slow
def test_a_tokenizer_that_the_engine_reads_otherwise_is_refused(tmp_path: Path) -> None:
    folder = write_fast(tmp_path / "m", split_special_tokens=True)
    with pytest.raises(ExportError, match=r"with the files beside it: pipeload would make other tokens of "):
        export(write_onnx(folder / "model.onnx"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["m", "m/onnx"])
def test_code_of_a_tokenizer_runs_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The option was taken, and the code beside an `.onnx` file refused as if it had not been given."""
    from transformers.utils import hub

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(hub, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = write_fast(tmp_path / "m", tokenizer_class="OwnFast", auto_map={"AutoTokenizer": [None, "own.OwnFast"]})
    write_json(folder / "config.json", {"model_type": "own"})
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import BertTokenizerFast\n\n"
        "class OwnFast(BertTokenizerFast):\n"
        "    def __init__(self, *arguments, **options):\n"
        "        super().__init__(*arguments, **options)\n"
        "        self.add_tokens(['ab'])\n"
    )
    (tmp_path / place).mkdir(exist_ok=True)
    source = write_onnx(tmp_path / place / "model.onnx")
    with pytest.raises(ExportError, match=r"brings Python code of its own.*--trust-remote-code"):
        _exported(source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    tokenizer = _exported(source, tmp_path / "out", trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert tokenizer.encode("ab c", add_special_tokens=False).tokens == ["ab", "c"]


def test_without_transformers_the_files_are_kept_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "has_module", lambda name: name != "transformers")
    folder = write_fast(tmp_path / "m", do_lower_case=False)
    export(write_onnx(folder / "model.onnx"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
