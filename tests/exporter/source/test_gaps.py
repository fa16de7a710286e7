"""No weight of an export is random, and none of the checkpoint is dropped, unless the user says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.exporter.models import write_bert, write_gpt2
from tests.models import traced_here

import pipeload
from pipeload.errors import ConfigError, ExportError
from pipeload.format.manifest import Manifest
from pipeload_export import export
from pipeload_export.source.gaps import Gaps, load_whole

Tensors = dict[str, Any]


def changed(folder: Path, change: Callable[[Tensors], object]) -> Path:
    """The checkpoint with other tensors in its file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def exported(folder: Path, target: Path, **options: Any) -> Manifest:
    with traced_here():
        return export(folder, target, **options)


def test_a_head_that_the_checkpoint_lacks_is_refused_by_name(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    with pytest.raises(ExportError) as caught:
        exported(bert, tmp_path / "out", task="question-answering")
    said = str(caught.value)
    assert "the checkpoint lacks 2 weights of BertForQuestionAnswering: qa_outputs.bias, qa_outputs.weight." in said
    assert "Its config.json names BertModel. Pass --task feature-extraction, or a complete" in said
    assert not (tmp_path / "out").exists()


def test_a_weight_that_the_checkpoint_lacks_is_refused_by_name(tmp_path: Path) -> None:
    name = "encoder.layer.1.output.dense.weight"
    bert = changed(write_bert(tmp_path / "bert"), lambda tensors: tensors.pop(name))
    with pytest.raises(ExportError, match=f"lacks 1 weight of BertModel: {name}"):
        exported(bert, tmp_path / "out")


def test_a_missing_weight_that_no_output_needs_is_no_fault(tmp_path: Path) -> None:
    whole = write_bert(tmp_path / "whole")
    bert = changed(
        write_bert(tmp_path / "bert"), lambda tensors: [tensors.pop(f"pooler.dense.{n}") for n in ("weight", "bias")]
    )
    manifests = [exported(folder, tmp_path / f"out-{folder.name}") for folder in (whole, bert)]
    assert manifests[1].missing_weights == ()
    assert manifests[0].files == manifests[1].files


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    assert "lm_head.weight" not in load_file(write_gpt2(tmp_path / "gpt2") / "model.safetensors")
    exported(tmp_path / "gpt2", tmp_path / "out", verify=False)


@pytest.mark.slow
def test_allowed_random_weights_are_in_the_manifest_and_the_same_each_time(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    options = {"task": "question-answering", "allow_missing": True}
    manifests = [exported(bert, tmp_path / name, **options) for name in ("a", "b")]
    assert manifests[0].missing_weights == ("qa_outputs.bias", "qa_outputs.weight")
    with pipeload.load(tmp_path / "a", "8GB") as first, pipeload.load(tmp_path / "b", "8GB") as second:
        inputs = {name: np.ones((1, 4), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
        answers = [model.run(inputs)["start_logits"] for model in (first, second)]
    np.testing.assert_array_equal(answers[0], answers[1])
    assert not np.isnan(answers[0]).any()


@pytest.mark.parametrize(
    "name",
    ["encoder.layer.1.attention.self.query.gain", "encoder.layer.2.output.dense.weight", "embeddings.more.weight"],
)
def test_a_weight_inside_the_model_that_it_does_not_use_is_refused_by_name(tmp_path: Path, name: str) -> None:
    bert = changed(write_bert(tmp_path / "bert"), lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    with pytest.raises(ExportError, match=f"1 weight of the checkpoint has no place in BertModel .*: {name}"):
        exported(bert, tmp_path / "out")
    assert exported(bert, tmp_path / "out", allow_missing=True).unused_weights == (name,)


@pytest.mark.slow
def test_a_head_that_the_task_leaves_out_is_no_fault(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForPreTraining(BertConfig(**sizes, vocab_size=100, max_position_embeddings=40))
    model.save_pretrained(tmp_path / "bert")
    changed(tmp_path / "bert", lambda t: t.update({"bert.embeddings.position_ids": np.arange(40)[None]}))
    for task in ("fill-mask", "feature-extraction"):
        assert exported(tmp_path / "bert", tmp_path / task, task=task).missing_weights == ()


def test_a_weight_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    name = "encoder.layer.0.output.dense.bias"
    bert = changed(write_bert(tmp_path / "bert"), lambda tensors: tensors.update({name: np.ones(5, np.float32)}))
    with pytest.raises(ExportError, match=f"1 weight of the checkpoint has another shape than BertModel .*: {name}"):
        exported(bert, tmp_path / "out")


def test_an_encoder_alone_is_no_encoder_with_a_random_decoder(tmp_path: Path) -> None:
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    T5EncoderModel(T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=100)).save_pretrained(
        tmp_path / "t5"
    )
    assert [spec.name for spec in exported(tmp_path / "t5", tmp_path / "out").inputs] == ["input_ids", "attention_mask"]
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    (tmp_path / "t5" / "config.json").write_text(json.dumps({**config, "architectures": ["T5Model"]}))
    with pytest.raises(ExportError, match=r"lacks 28 weights of T5Model: decoder\..* names T5Model\. Pass a complete"):
        exported(tmp_path / "t5", tmp_path / "other")


def test_only_checkpoints_lack_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--allow-missing is for checkpoints"):
        export("catalog:minilm", tmp_path / "out", allow_missing=True)


def test_a_table_that_a_class_computes_is_not_missing(tmp_path: Path) -> None:
    """Marian leaves its table of sines out of its checkpoints: no seed changes it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2)
    config = transformers.MarianConfig(vocab_size=40, d_model=16, pad_token_id=0, decoder_start_token_id=0, **sizes)
    source = transformers.MarianMTModel(config)
    source.save_pretrained(tmp_path)
    assert not any("embed_positions" in name for name in load_file(tmp_path / "model.safetensors"))
    model, gaps = load_whole(transformers.AutoModel, tmp_path, allow_missing=False)
    assert gaps == Gaps()
    assert torch.equal(model.encoder.embed_positions.weight, source.model.encoder.embed_positions.weight)
