"""Checkpoints that torch's own exporter exports, as it does where transformers 5 is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.marks import slow, survey
from tests.models import seeded, traced_here

from pipeload.errors import ExportError
from pipeload.format.manifest import Manifest
from pipeload_export import export
from pipeload_export.source import trace

_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT = {**_SIZES, "vocab_size": 200, "max_position_embeddings": 64, "initializer_range": 0.3}
_DECODER = {**_TEXT, "num_key_value_heads": 1, "pad_token_id": 0}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64, "vocab_size": 200, "initializer_range": 0.3}

# name -> (class of transformers, class of its config, the config's arguments)
CHECKPOINTS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _TEXT),
    "bert-questions": ("BertForQuestionAnswering", "BertConfig", _TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "llama-dynamic": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_DECODER, "max_position_embeddings": 20, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "roberta-labels": ("RobertaForSequenceClassification", "RobertaConfig", {**_TEXT, "max_position_embeddings": 50}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_SIZES, "image_size": 32, "patch_size": 8}),
}


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Manifest]:
    """name -> the manifest of its export, which is held against the source."""
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(trace, "has_optimum", lambda: False)

    def make(name: str) -> Manifest:
        seeded(*CHECKPOINTS[name]).save_pretrained(tmp_path / "source")
        with traced_here():
            return export(tmp_path / "source", tmp_path / "target")

    return make


@pytest.mark.parametrize("name", [slow(name) if name in ("bert", "llama") else survey(name) for name in CHECKPOINTS])
def test_an_export_has_the_answers_of_its_source(name: str, exported: Callable[[str], Manifest]) -> None:
    manifest = exported(name)
    assert sum(shard.role == "block" for shard in manifest.shards) == 3
    assert manifest.parity is not None
    assert manifest.parity.outputs
    if manifest.task == "text-generation":
        assert len(manifest.caches) == 6
        assert manifest.parity.tokens_equal == manifest.parity.tokens > 0


@pytest.mark.survey
def test_inputs_and_sizes_have_the_names_of_optimums(exported: Callable[[str], Manifest]) -> None:
    inputs = {spec.name: spec.shape for spec in exported("llama").inputs}
    assert inputs["input_ids"] == inputs["position_ids"] == ("batch_size", "sequence_length")
    assert inputs["attention_mask"] == ("batch_size", "past_sequence_length + sequence_length")
    assert inputs["past_key_values.2.value"] == ("batch_size", 1, "past_sequence_length", 16)


@pytest.mark.slow
def test_a_model_of_texts_and_images_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "has_optimum", lambda: False)
    towers = {"text_config": {**_TEXT}, "vision_config": {**_SIZES, "image_size": 32, "patch_size": 8}}
    seeded("CLIPModel", "CLIPConfig", towers).save_pretrained(tmp_path / "source")
    with traced_here(), pytest.raises(ExportError, match=r"texts and images.* 4: pip install '\.\[export\]' in"):
        export(tmp_path / "source", tmp_path / "target", task="feature-extraction")
