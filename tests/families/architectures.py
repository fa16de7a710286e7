"""The sizes of each architecture that the families are made of: arguments of transformers' config classes.

A config class gets those arguments of `SMALL` that it knows, and those of its own entry here. What follows a slash in a
name is a variant or another head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCABULARY = 1000
POSITIONS = 320
IMAGE = 32

SMALL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "image_size": IMAGE,
    "patch_size": 8,
    # Of encoder-decoders; hidden_size stands for d_model in many of them.
    "d_model": 64,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
_CHANNELS = {"hidden_sizes": [16, 32, 48, 64]}
_SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2}
_ENCODER = {"num_decoder_layers": 4, "num_layers": 4, "num_heads": 4, "d_kv": 16, "d_ff": 128}
_RESNET = {"model_type": "resnet", "embedding_size": 16, **_CHANNELS, "depths": [1, 1, 1, 1], "layer_type": "basic"}
_RESNET_BACKBONE = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "num_queries": 10,
    "backbone_config": {**_RESNET, "out_features": ["stage4"]},
}
_VISION = {name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")} | {
    "intermediate_size": 128,
    "image_size": IMAGE,
    "patch_size": 8,
    "initializer_range": 0.2,
    "projection_dim": 32,
}
_TEXT = {**_VISION, "vocab_size": VOCABULARY, "max_position_embeddings": 77, "bos_token_id": 1, "eos_token_id": 2}
_TOWERS = {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 32}
_SOUND = {
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 4, 2],
    "conv_kernel": [10, 8, 4],
    "vocab_size": 32,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "mask_time_prob": 0.0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]}
    | {"long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]},
    "original_max_position_embeddings": 64,
}
_GEMMA3 = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings", "initializer_range"),
}
_MIXED = ["sliding_attention", "full_attention"] * 2
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

ENCODERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "albert": ("fill-mask", {"embedding_size": 32}),
    "bert": ("feature-extraction", {}),
    "bert/fill-mask": ("fill-mask", {}),
    "bert/question-answering": ("question-answering", {}),
    "bert/text-classification": ("text-classification", {}),
    "bert/token-classification": ("token-classification", {}),
    "bert/relative": ("feature-extraction", {"position_embedding_type": "relative_key_query"}),
    "big_bird": ("feature-extraction", {"block_size": 8, "num_random_blocks": 2}),
    "big_bird/full": ("fill-mask", {"attention_type": "original_full"}),
    "camembert": ("token-classification", {}),
    "convbert": ("feature-extraction", {"embedding_size": 32, "conv_kernel_size": 5}),
    "data2vec-text": ("text-classification", {}),
    "deberta": ("feature-extraction", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": (
        "text-classification",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16, "share_att_key": True}
        | {"norm_rel_ebd": "layer_norm", "position_biased_input": False},
    ),
    "deberta-v2/conv": ("feature-extraction", {"relative_attention": True, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "distilbert": ("text-classification", {"hidden_dim": 128}),
    "electra": ("token-classification", {"embedding_size": 32}),
    "esm": ("fill-mask", {"position_embedding_type": "rotary", "mask_token_id": 4, "token_dropout": True}),
    "esm/absolute": ("feature-extraction", {"mask_token_id": 4, "emb_layer_norm_before": True}),
    "flaubert": ("feature-extraction", {"n_words": VOCABULARY}),
    "ibert": ("feature-extraction", {}),
    "layoutlm": ("token-classification", {}),
    "layoutlmv3": (
        "token-classification",
        {"input_size": IMAGE, "coordinate_size": 10, "shape_size": 12, "rel_pos_bins": 8, "rel_2d_pos_bins": 8},
    ),
    "lilt": ("token-classification", {"channel_shrink_ratio": 4, "hidden_size": 96}),
    "longformer": ("feature-extraction", {"attention_window": 8}),
    "markuplm": ("feature-extraction", {"max_depth": 10}),
    "megatron-bert": ("feature-extraction", {}),
    "mobilebert": (
        "feature-extraction",
        {"embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2}
        # Without norms wider weights grow to values at which float32 itself is 0.7 % off.
        | {"initializer_range": 0.05},
    ),
    "modernbert": ("fill-mask", {"local_attention": 16, "global_attn_every_n_layers": 2}),
    "mpnet": ("feature-extraction", {}),
    "nystromformer": ("feature-extraction", {}),
    "nystromformer/landmarks": ("feature-extraction", {"num_landmarks": 8, "segment_means_seq_len": 64}),
    "perceiver": (
        "fill-mask",
        {"d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 4, "num_self_attention_heads": 4}
        | {"num_cross_attention_heads": 4},
    ),
    "rembert": ("feature-extraction", {"input_embedding_size": 32, "output_embedding_size": 32}),
    "roberta": ("feature-extraction", {}),
    "roformer": ("text-classification", {"embedding_size": 32}),
    "splinter": ("question-answering", {"question_token_id": 4}),
    "squeezebert": ("token-classification", {"embedding_size": 64}),
    "visual_bert": ("feature-extraction", {"visual_embedding_dim": 32}),
    "xlm": ("question-answering", {"n_words": VOCABULARY}),
    "xlm/feature-extraction": ("feature-extraction", {"n_words": VOCABULARY}),
    "xlm-roberta": ("feature-extraction", {}),
}

DECODERS: Mapping[str, Mapping[str, Any]] = {
    "arcee": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": {},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "qk_nope_head_dim": 8,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "falcon": {},
    "falcon/alibi": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon/new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 32, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 32, "layer_types": _MIXED},
    "gemma3": {
        "text_config": {name: value for name, value in SMALL.items() if name in _GEMMA3}
        | {"query_pre_attn_scalar": 16, "sliding_window": 32, "layer_types": _MIXED},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "boi_token_index": 4,
        "eoi_token_index": 5,
        "image_token_index": 6,
    },
    "glm": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32, "rope_scaling": None},
    "gptj": {"rotary_dim": 8},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "helium": {},
    "llama": {},
    "llama/dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64},
    "llama/linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama/llama3": {"rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 64}},
    "llama/yarn": {"rope_scaling": _YARN},
    "mistral": {},
    "mistral/sliding": {"sliding_window": 32},
    "mpt": {"max_seq_len": POSITIONS, "expansion_ratio": 2},
    "nemotron": {},
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "opt/350m": {"ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "phi": {"partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    "phi/gqa": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "phi3/longrope": _LONG,
    "phi3/sliding": {"sliding_window": 32},
    "qwen2": {},
    "qwen2/sliding": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {},
    "stablelm/parallel": {"use_qkv_bias": True, "use_parallel_residual": True},
}
"""Models for text generation."""

OTHER_HEADS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bloom/token-classification": ("token-classification", {}),
    "falcon/question-answering": ("question-answering", {}),
    "gemma/text-classification": ("text-classification", {}),
    "gemma3_text/feature-extraction": (
        "feature-extraction",
        {"query_pre_attn_scalar": 16, "sliding_window": 32, "layer_types": _MIXED},
    ),
    "gpt2/token-classification": ("token-classification", {}),
    "gpt_neo/text-classification": (
        "text-classification",
        {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    ),
    "llama/text-classification": ("text-classification", {}),
    "mistral/feature-extraction": ("feature-extraction", {}),
    "opt/question-answering": ("question-answering", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "phi/text-classification": (
        "text-classification",
        {"partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    ),
    "qwen2/token-classification": ("token-classification", {}),
    "qwen3/feature-extraction": ("feature-extraction", {}),
    # Encoder-decoders.
    "bart": ("feature-extraction", {}),
    "bart/text-classification": ("text-classification", {}),
    "bart/question-answering": ("question-answering", {}),
    "bart/text-generation": ("text-generation", {}),
    "bigbird_pegasus": ("feature-extraction", {"block_size": 8, "num_random_blocks": 2}),
    "blenderbot": ("feature-extraction", {}),
    "blenderbot/text-generation": ("text-generation", {}),
    "blenderbot-small": ("feature-extraction", {}),
    "longt5": ("feature-extraction", {**_ENCODER, "local_radius": 8}),
    "m2m_100": ("feature-extraction", {}),
    "marian": ("feature-extraction", {}),
    "marian/text-generation": ("text-generation", {}),
    "mbart": ("feature-extraction", {}),
    "mbart/text-generation": ("text-generation", {}),
    "mt5": ("feature-extraction", _ENCODER),
    "pegasus": ("feature-extraction", {}),
    "pegasus/text-generation": ("text-generation", {}),
    "t5": ("feature-extraction", _ENCODER),
}

VISUAL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "beit": ("image-classification", {"use_relative_position_bias": True, "out_indices": [0, 1, 2, 3]}),
    "beit/absolute": (
        "feature-extraction",
        {"use_absolute_position_embeddings": True, "out_indices": [0, 1, 2, 3]},
    ),
    "chinese_clip": ("feature-extraction", _TOWERS),
    "clip": ("feature-extraction", _TOWERS),
    "clip/image-classification": ("image-classification", _TOWERS),
    "clip_vision_model": ("feature-extraction", {"projection_dim": 32}),
    "convnext": ("image-classification", {**_CHANNELS, "depths": [1, 1, 4, 1], "patch_size": 4}),
    "convnextv2": ("image-classification", {**_CHANNELS, "depths": [1, 1, 4, 1], "patch_size": 4}),
    "cvt": ("image-classification", {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 4]}),
    "data2vec-vision": (
        "image-classification",
        {"use_relative_position_bias": True, "out_indices": [0, 1, 2, 3]},
    ),
    "deit": ("image-classification", {"architectures": ["DeiTForImageClassification"]}),
    "deit/teacher": ("image-classification", {"architectures": ["DeiTForImageClassificationWithTeacher"]}),
    "detr": ("feature-extraction", _RESNET_BACKBONE),
    "dinov2": ("feature-extraction", {}),
    "dinov2/image-classification": ("image-classification", {}),
    "donut-swin": ("feature-extraction", _SWIN),
    "dpt": ("feature-extraction", {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 32, 48, 64]}),
    "efficientnet": (
        "image-classification",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    ),
    "glpn": ("feature-extraction", {**_CHANNELS, "num_attention_heads": [1, 2, 3, 4]}),
    "groupvit": (
        "feature-extraction",
        {
            "text_config": _TEXT,
            "vision_config": _VISION
            | {"depths": [2, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]},
            "projection_dim": 32,
            "projection_intermediate_dim": 64,
        },
    ),
    "hiera": (
        "image-classification",
        {"embed_dim": 16, "depths": [1, 1, 4, 1], "num_heads": [1, 1, 2, 4], "image_size": [64, 64]}
        | {"patch_size": [7, 7]},
    ),
    "imagegpt": ("image-classification", {"n_positions": 64, "vocab_size": 100}),
    "levit": (
        "image-classification",
        {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "key_dim": [16, 16, 16], "image_size": 64}
        | {"architectures": ["LevitForImageClassificationWithTeacher"]},
    ),
    "maskformer": (
        "feature-extraction",
        {
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "backbone_config": {"model_type": "swin", **_SWIN, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2]}
            | {"image_size": IMAGE, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
            "decoder_config": {"model_type": "detr", **_RESNET_BACKBONE, "d_model": 32, "decoder_layers": 2},
        },
    ),
    "metaclip_2": ("feature-extraction", _TOWERS),
    "mgp-str": (
        "feature-extraction",
        {"image_size": [32, 128], "num_bpe_labels": 100, "num_wordpiece_labels": 100, "patch_size": 4},
    ),
    "mobilenet_v1": ("image-classification", {"depth_multiplier": 0.25}),
    "mobilenet_v2": ("image-classification", {"depth_multiplier": 0.25}),
    "mobilevit": (
        "image-classification",
        {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 16, 32, 32, 48, 64], "patch_size": 2}
        | {"image_size": 64},
    ),
    "owlv2": ("feature-extraction", _TOWERS),
    "owlvit": ("feature-extraction", _TOWERS),
    "poolformer": ("image-classification", {**_CHANNELS, "depths": [1, 1, 4, 1], "patch_size": 4}),
    "pvt": (
        "image-classification",
        {**_CHANNELS, "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 3, 4], "image_size": 64},
    ),
    "regnet": ("image-classification", {**_CHANNELS, "depths": [1, 1, 4, 1], "groups_width": 8}),
    "resnet": ("image-classification", {**_CHANNELS, "depths": [1, 1, 4, 1], "embedding_size": 16}),
    "sam": (
        "feature-extraction",
        {
            "vision_config": {**_VISION, "output_channels": 32, "global_attn_indexes": [1, 3], "window_size": 2}
            | {"num_pos_feats": 16, "mlp_dim": 128},
            "prompt_encoder_config": {"hidden_size": 32, "image_size": IMAGE, "patch_size": 8},
            "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4}
            | {"iou_head_hidden_dim": 32},
        },
    ),
    "segformer": ("image-classification", {**_CHANNELS, "num_attention_heads": [1, 2, 3, 4], "image_size": 64}),
    "siglip": ("feature-extraction", {"text_config": _TEXT, "vision_config": _VISION}),
    "siglip_vision_model": ("feature-extraction", {}),
    "swin": ("image-classification", {**_SWIN, "depths": [2, 4]}),
    "swin2sr": ("feature-extraction", {**_SWIN, "depths": [2, 2], "patch_size": 1}),
    "swinv2": ("image-classification", {**_SWIN, "depths": [2, 4]}),
    "table-transformer": ("feature-extraction", _RESNET_BACKBONE),
    "vit": ("image-classification", {}),
    "vit/feature-extraction": ("feature-extraction", {}),
    "vit_mae": ("feature-extraction", {"mask_ratio": 0.0}),
    "vit_msn": ("image-classification", {}),
    "yolos": ("feature-extraction", {"image_size": [32, 32], "num_detection_tokens": 10}),
}

SOUNDS: Mapping[str, Mapping[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8},
    "data2vec-audio": {**_SOUND, "conv_pos_kernel_size": 5},
    "hubert": _SOUND,
    "mctct": {"num_hidden_layers": 4, "input_feat_per_channel": 16, "attention_head_dim": 16},
    "moonshine": {"encoder_num_hidden_layers": 4, "decoder_num_hidden_layers": 4}
    | {"encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4}
    | {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "sew": {**_SOUND, "squeeze_factor": 2},
    "sew-d": {**_SOUND, "squeeze_factor": 2, "position_buckets": 16},
    "speech_to_text": {"max_source_positions": 200, "max_target_positions": 100, "conv_channels": 32},
    "unispeech": _SOUND,
    "unispeech-sat": _SOUND,
    "wav2vec2": _SOUND,
    "wav2vec2-conformer": _SOUND,
    "wavlm": _SOUND,
    "whisper": {"max_source_positions": 50, "max_target_positions": 60, "num_mel_bins": 16, "suppress_tokens": []}
    | {"begin_suppress_tokens": []},
}
"""For feature extraction, from waves or spectrograms."""

SERIES: Mapping[str, Mapping[str, Any]] = {
    "decision_transformer": {"n_layer": 4, "n_head": 4, "max_ep_len": 200},
    "patchtsmixer": {"num_layers": 4, "num_input_channels": 2, "context_length": 64, "dropout": 0.0},
    "patchtst": {"num_input_channels": 2, "context_length": 64, "patch_length": 8, "patch_stride": 8}
    | {"ffn_dim": 128, "num_hidden_layers": 4},
}
