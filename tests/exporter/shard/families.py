"""Families whose inputs have sizes that belong together, as tiny seeded ONNX graphs with the files beside them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.models import seeded

__all__ = ["FAMILIES", "write_family"]

_SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {**_SMALL, "vocab_size": 100}
_PATCHES = {**_SMALL, "image_size": 64, "patch_size": 16}
_SOUND = {
    **_SMALL,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 40,
}
_SQUARE = {"size": {"height": 64, "width": 64}}


def _both_sides(ffn_dim: int) -> dict[str, int]:
    """Sizes of the layers of an encoder and a decoder."""
    sizes = {"layers": 3, "ffn_dim": ffn_dim, "attention_heads": 4}
    return {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}


# name -> (class of transformers, class of its config, the config's arguments, task of optimum, the processor's file)
FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any], str, Mapping[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _TEXT, "feature-extraction", {}),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_TEXT, "num_key_value_heads": 2},
        "text-generation-with-past",
        {},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _PATCHES, "image-classification", _SQUARE),
    "dinov2": (
        "Dinov2Model",
        "Dinov2Config",
        {**_SMALL, "image_size": 518, "patch_size": 14},
        "feature-extraction",
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224},
    ),
    "segformer": (
        "SegformerForImageClassification",
        "SegformerConfig",
        {"depths": [2, 2, 2, 2], "hidden_sizes": [16, 32, 32, 64], "num_attention_heads": [1, 2, 2, 4]},
        "image-classification",
        {"size": 128},
    ),
    "yolos": (
        "YolosForObjectDetection",
        "YolosConfig",
        {**_SMALL, "image_size": [64, 96], "num_detection_tokens": 10},
        "object-detection",
        {},
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_TEXT, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 1},
            "vision_config": _PATCHES,
            "projection_dim": 32,
        },
        "feature-extraction",
        {},
    ),
    "chinese_clip": (
        "ChineseCLIPModel",
        "ChineseCLIPConfig",
        {"text_config": _TEXT, "vision_config": _PATCHES, "projection_dim": 32},
        "feature-extraction",
        {},
    ),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**_TEXT, "max_position_embeddings": 16}, "vision_config": _PATCHES},
        "feature-extraction",
        {},
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"embed_dim": 16, "depths": [2, 2, 4, 2], "num_heads": [1, 2, 2, 4], "image_size": 224, "window_size": 7},
        "image-classification",
        {"size": {"height": 224, "width": 224}},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [2, 2, 3, 2]},
        "image-classification",
        {"size": {"shortest_edge": 224}},
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 32, 64, 64], "depths": [2, 2, 3, 2]},
        "image-classification",
        {"size": {"shortest_edge": 224}},
    ),
    "detr": (
        "DetrForObjectDetection",
        "DetrConfig",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 16, 32, 32],
                "depths": [1, 1, 1, 1],
                "out_features": ["stage4"],
            },
            "d_model": 32,
            "num_queries": 10,
            **_both_sides(ffn_dim=64),
        },
        "object-detection",
        {},
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [16, 16, 16, 16, 24, 32, 64], "image_size": 128},
        "image-classification",
        {},
    ),
    "poolformer": (
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [2, 2, 4, 2]},
        "image-classification",
        {},
    ),
    "levit": (
        "LevitForImageClassification",
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [2, 2, 2],
            "key_dim": [8, 8, 8],
        },
        "image-classification",
        {},
    ),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", _SOUND, "feature-extraction", {}),
    "hubert": ("HubertModel", "HubertConfig", _SOUND, "feature-extraction", {}),
    "wavlm": ("WavLMModel", "WavLMConfig", _SOUND, "feature-extraction", {}),
    "longformer": (
        "LongformerModel",
        "LongformerConfig",
        {**_TEXT, "attention_window": [8, 8, 8], "max_position_embeddings": 130, "pad_token_id": 1},
        "feature-extraction",
        {},
    ),
    "bart": (
        "BartForSequenceClassification",
        "BartConfig",
        {
            "d_model": 64,
            "vocab_size": 100,
            "max_position_embeddings": 64,
            "eos_token_id": 2,
            "pad_token_id": 1,
            **_both_sides(ffn_dim=128),
        },
        "text-classification",
        {},
    ),
}


def write_family(folder: Path, name: str) -> None:
    """Write the family's `model.onnx`, `config.json` and `preprocessor_config.json`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exporters = pytest.importorskip("optimum.exporters.onnx")
        model_class, config_class, options, task, processor = FAMILIES[name]
        model = seeded(model_class, config_class, options)
        folder.mkdir(parents=True)
        if processor:
            (folder / "preprocessor_config.json").write_text(json.dumps(processor))
            (folder / "config.json").write_text(json.dumps(model.config.to_diff_dict()))
            # DINOv2's trial inputs are as large as its processor says.
            model.config._name_or_path = str(folder)
        exporters.onnx_export_from_model(model, output=folder, task=task, do_validation=False)
