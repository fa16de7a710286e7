"""Checkpoints that transformers 5 saved export like those of transformers 4, and no key of a config is overlooked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.exporter.models import write_bert, write_json
from tests.models import traced_here

from pipeload.errors import ExportError
from pipeload_export import export
from pipeload_export.source.config_keys import unknown_keys
from pipeload_export.source.older_form import older_config, older_tokenizer_config, view_of
from pipeload_export.source.refused import Refused

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
_FULL, _LOCAL = {"rope_type": "default", "rope_theta": 7e5}, {"rope_type": "default", "rope_theta": 5e3}

# model type -> the keys that transformers 4 writes, and what transformers 5 writes in their place
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "scaling": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": _LLAMA3},
        {"rope_parameters": {"rope_theta": 5e5, **_LLAMA3}, "layer_types": ["full_attention"]},
    ),
    "part": (
        "phi",
        {"rope_theta": 2e4, "partial_rotary_factor": 0.25},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.25}},
    ),
    "other names": (
        "gpt_neox",
        {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}},
    ),
    "long": (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", **_FACTORS},
            "original_max_position_embeddings": 64,
            "hidden_size": 64,
            "num_attention_heads": 4,
        },
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 64,
                **_FACTORS,
            },
            "hidden_size": 64,
            "num_attention_heads": 4,
        },
    ),
    "layers": (
        "gemma3_text",
        {"rope_theta": 7e5, "rope_local_base_freq": 5e3},
        {"rope_parameters": {"full_attention": _FULL, "sliding_attention": _LOCAL}},
    ),
    "layers, scaled": (
        "gemma3_text",
        {"rope_theta": 7e5, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7e5},
                "sliding_attention": _LOCAL,
            }
        },
    ),
    "layers, other names": (
        "modernbert",
        {"global_rope_theta": 7e5, "local_rope_theta": 5e3},
        {"rope_parameters": {"full_attention": _FULL, "sliding_attention": _LOCAL}},
    ),
    "nested": (
        "gemma3",
        {"text_config": {"model_type": "gemma3_text", "rope_theta": 7e5, "rope_local_base_freq": 5e3}},
        {
            "text_config": {
                "model_type": "gemma3_text",
                "rope_parameters": {"full_attention": _FULL, "sliding_attention": _LOCAL},
            }
        },
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_rope_of_transformers_5_is_that_of_transformers_4(name: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, four, five = FORMS[name]
    kind = CONFIG_MAPPING[model_type]
    older = older_config({"model_type": model_type, "dtype": "float32", **five}, kind)
    assert unknown_keys(older, kind) == []
    found, expected = kind.from_dict(older).to_dict(), kind.from_dict({"dtype": "float32", **four}).to_dict()
    found.pop("layer_types", None), expected.pop("layer_types", None)
    assert found == expected


@pytest.mark.parametrize(
    "rope",
    [
        {"full_attention": _FULL, "sliding_attention": _LOCAL},
        {"full_attention": _FULL, "chunked_attention": _FULL},
        {"sliding_attention": _LOCAL},
    ],
)
def test_a_rope_that_transformers_4_has_no_place_for_is_refused(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    older = older_config({"rope_parameters": rope}, LlamaConfig)
    assert unknown_keys(older, LlamaConfig) == ["rope_parameters"]


def write_llama(folder: Path) -> dict[str, Any]:
    """A checkpoint with a theta of its own. Returns its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, rope_theta=5e5, max_position_embeddings=64)).save_pretrained(
        folder
    )
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_a_checkpoint_of_transformers_5_becomes_the_same_shards(tmp_path: Path) -> None:
    config = write_llama(tmp_path / "four")
    write_llama(tmp_path / "five")
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    del config["rope_scaling"]
    write_json(tmp_path / "five" / "config.json", {**config, "rope_parameters": rope, "transformers_version": "5.0.0"})
    shards = []
    with traced_here():
        for name in ("four", "five"):
            manifest = export(tmp_path / name, tmp_path / f"out-{name}", verify=False)
            shards.append([record for record in manifest.files if record.path.startswith("shards/")])
    assert shards[0] == shards[1]


def test_a_key_that_nothing_reads_is_refused_by_name(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    config = json.loads((bert / "config.json").read_text())
    write_json(bert / "config.json", {**config, "gated_mixing": {"heads": 2}, "window": 5})
    with traced_here(), pytest.raises(ExportError) as caught:
        export(bert, tmp_path / "out")
    assert "has 2 keys that BertConfig of transformers" in str(caught.value)
    assert 'does not read: gated_mixing = {"heads": 2}, window = 5.' in str(caught.value)


# What the hub's own files hold beside the keys of the class.
USUAL: dict[str, dict[str, Any]] = {
    "bert": {
        "gradient_checkpointing": False,
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_type": "first_token_transform",
        "classifier_dropout": None,
        "language": "english",
        "name": "Bert",
        "_num_labels": 2,
        "output_past": True,
        "position_embedding_type": "absolute",
        "sentence_transformers": {"activation_fn": "x", "version": "4.0"},
        "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
    },
    "llama": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "max_sequence_length": 2048,
        "unsloth_fixed": True,
        "pretraining_tp": 1,
        "_attn_implementation_autoset": True,
        "auto_map": {},
        "quantization_config": None,
        "task_specific_params": {"x": 1},
    },
    "qwen2": {"use_mrope": False, "max_window_layers": 28, "use_sliding_window": False, "sliding_window": 131072},
    "phi3": {"attention_bias": False, "auto_map": {"AutoConfig": "x"}, "embd_pdrop": 0.0},
    "gemma2": {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window_size": 4096,
        "cache_implementation": "hybrid",
    },
    "gemma3_text": {"cache_implementation": "hybrid", "sliding_window_pattern": 6},
    "gpt2": {"n_ctx": 1024, "summary_type": "cls_index", "summary_use_proj": True},
    "gptj": {"rotary": True, "scale_attn_weights": True, "tokenizer_class": "GPT2Tokenizer"},
    "distilbert": {"finetuning_task": "sst-2", "tie_weights_": True, "output_past": True},
    "opt": {"output_projection": True, "prefix": "</s>", "_remove_final_layer_norm": False},
    "bloom": {"offset_alibi": 100, "seq_length": 2048, "attention_softmax_in_fp32": True, "n_inner": None},
    "modernbert": {"layer_norm_eps": 1e-5, "norm_eps": 1e-5, "position_embedding_type": "absolute"},
    "gpt_bigcode": {"inference_runner": 0, "pad_key_length": True, "validate_runner_input": True},
    "albert": {"net_structure_type": 0, "gap_size": 0, "down_scale_factor": 1, "layers_to_keep": []},
    "vit": {"encoder_stride": 16, "qkv_bias": True},
}


@pytest.mark.parametrize("model_type", USUAL)
def test_usual_keys_are_never_refused(model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    config = json.loads(kind().to_json_string(use_diff=False)) | USUAL[model_type]
    assert unknown_keys(config, kind) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"tokenizer_class": "BertTokenizer"}, {"tokenizer_class": "BertTokenizer"}),
        ({"extra_special_tokens": ["<a>"]}, {"additional_special_tokens": ["<a>"]}),
        ({"extra_special_tokens": {"a": "<a>"}}, {"extra_special_tokens": {"a": "<a>"}}),
    ],
)
def test_tokenizer_classes_of_transformers_5(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert older_tokenizer_config(given, has_json=True) == expected


def test_a_view_leaves_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    before = (bert / "config.json").read_bytes()
    view = view_of(bert, tmp_path / "view")
    assert {path.name for path in view.iterdir()} == {path.name for path in bert.iterdir()}
    assert (bert / "config.json").read_bytes() == before
    assert view_of(bert, view) == view
    write_json(bert / "config.json", {"model_type": "bert", "new": 1})
    with pytest.raises(Refused, match="does not read: new = 1"):
        view_of(bert, tmp_path / "other")


@pytest.mark.parametrize(
    ("model_type", "key"), [("segformer", "image_size"), ("segformer", "downsampling_rates"), ("swin", "path_norm")]
)
def test_keys_of_published_configs_that_nothing_reads_are_no_hindrance(model_type: str, key: str) -> None:
    """Those of nvidia/mit-b0 and microsoft/swin-tiny-patch4-window7-224."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert unknown_keys({"model_type": model_type, key: 224}, CONFIG_MAPPING[model_type]) == []
