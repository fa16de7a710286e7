"""Which keys of config.json have a meaning for the installed transformers.

A config class keeps keys that it does not know, and nothing ever reads them. Where such a key changes what the model
computes, as one of a newer version may, the answers are wrong without a word. So each key must be known to the class
or to the model's code, say that something is off, or be one of those that never change an answer.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["knows", "nested_kinds", "parameters", "unknown_keys"]

_HARMLESS = re.compile(
    r"_name_or_path|architectures|auto_map|(\w+_)?version|transformers\.js_config|model_type|(\w+_)?dtype|type|name|author|"
    # training
    r"gradient_checkpointing|\w*(dropout|pdrop|drop_rate|drop_prob|drop_path|_drop)\w*|initiali[sz]er_\w+|\w+_(std|gain)|"
    r"\w*init_(std|method|device|config|gain|scale|fn)|init_\w+|\w*_init|\w*loss\w*|neftune\w*|output_past|layerdrop|"
    r"problem_type|finetuning_task|task_specific_params|_?num_labels|language|licen[sc]e|datasets?|adapters?|seed|"
    # how, not what
    r"use_cache|cache_implementation|onnx|\w*flash_att\w*|_?attn_implementation\w*|_flash\w*|use_(sdpa|memory_efficient\w*)|"
    r"masked_softmax_fusion|bias_dropout_fusion|\w*fused_\w+|use_fused\w*|attention_softmax_in_fp32|inference_runner|"
    r"max_batch_size|pre_allocate_kv_cache|validate_runner_input|pad_key_length|pretraining_tp|tp_\w+|ep_size|verbose|"
    r"unsloth_\w+|device_map|torchscript|"
    # lengths, tokens and labels that the tokenizer or the caller decides
    r"n_ctx|n_positions|seq_length|max_seq(uence)?_len(gth)?|model_max_length|\w*_tokens?|\w*_token_ids?|"
    r"\w*_token_index|tokenizer_\w+|processor_class|image_processor_type|feature_extractor_type|chat_template|"
    r"sentence_transformers|sbert_\w+|prompts?|id2label|label2id|pad_vocab_size\w*|"
    # heads that no task of pipeload has, and what old versions wrote
    r"pooler_\w+|summary_\w+|directionality|tie_weights_?|is_llama_config|net_structure_type|gap_size|"
    r"down_scale_factor|num_memory_blocks|layers_to_keep|rotary|max_window_layers|skip_bias_add|sliding_window_size|"
    r"output_(attentions|hidden_states|projection)|return_dict\w*|generator_\w+|scale_attn_weights|offset_alibi|"
    r"image_size|downsampling_rates|path_norm"
)
_NEUTRAL = re.compile(r"\w*(scale|scaling|multiplier|factor|_mult)")
"""Ends of the names of factors; 1 of these changes nothing."""

_ANY = ("AutoConfig", "PretrainedConfig")
_TWINS = {"hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps", "norm_eps": "layer_norm_eps"}
"""Keys of which some models have both, with one value."""


def unknown_keys(config: Mapping[str, Any], kind: type) -> list[str]:
    """The keys that may change an answer and that neither the config class `kind` nor the model's code reads.

    Those of nested configs are written as `text_config.key`.
    """
    return list(_unknown(config, kind, ""))


def knows(kind: type, key: str) -> bool:
    """Whether the config class, or the code of its model, reads a key."""
    return key in parameters(kind) or key in vars(_base()) or key in _words(kind)


@cache
def parameters(kind: type) -> frozenset[str]:
    """The names of the arguments of a config class."""
    known = {name for part in kind.__mro__ if part is not object for name in inspect.signature(part).parameters}
    return frozenset(known | set(getattr(kind, "attribute_map", {})))


def nested_kinds(kind: type) -> dict[str, type]:
    """The keys that hold a config of their own, and the class of each, where it is known beforehand."""
    nested = getattr(kind, "sub_configs", {})
    if not isinstance(nested, dict):
        return {}
    return {key: found for key, found in nested.items() if isinstance(found, type) and found.__name__ not in _ANY}


def _unknown(config: Mapping[str, Any], kind: type, prefix: str) -> Iterator[str]:
    nested = nested_kinds(kind)
    for key, value in config.items():
        if key in nested and isinstance(value, dict):
            yield from _unknown(value, nested[key], f"{prefix}{key}.")
        elif not (_is_off(key, value) or _HARMLESS.fullmatch(key) or knows(kind, key) or _is_twin(key, config, kind)):
            yield prefix + key


def _is_twin(key: str, config: Mapping[str, Any], kind: type) -> bool:
    twin = _TWINS.get(key)
    return twin in parameters(kind) and bool(config[key] == config.get(str(twin), getattr(kind(), str(twin), None)))


def _is_off(key: str, value: Any) -> bool:
    """Whether the value leaves the model as it is without the key."""
    if key == "layer_types":
        return isinstance(value, list) and set(value) <= {"full_attention"}
    if key == "position_embedding_type":
        return bool(value == "absolute")
    is_one: bool = value == 1
    return value in (None, False, 0, "", "none", [], {}) or (is_one and bool(_NEUTRAL.fullmatch(key)))


@cache
def _base() -> Any:
    from transformers import PretrainedConfig

    return PretrainedConfig()


@cache
def _words(kind: type) -> frozenset[str]:
    """All attributes and strings in the source of the config class, of its model, and of what transformers shares."""
    import transformers
    from transformers import modeling_rope_utils

    folder = Path(str(sys.modules[kind.__module__].__file__)).parent
    files = [
        *folder.glob("configuration_*.py"),
        *(
            path
            for path in folder.glob("modeling_*.py")
            if not path.name.startswith(("modeling_tf_", "modeling_flax_"))
        ),
        Path(str(modeling_rope_utils.__file__)),
        Path(str(transformers.__file__)).with_name("modeling_utils.py"),
    ]
    return frozenset(word for path in files for word in re.findall(r"[.\"']([A-Za-z_]\w*)", path.read_text("utf-8")))
