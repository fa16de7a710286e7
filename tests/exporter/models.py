"""Small models for the exporter's tests: an ONNX graph without torch, and checkpoints of random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS = 1200
"""Rows of the embedding table, enough for it to be worth lifting out of the graph."""
WIDTH = 16
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def write_onnx(path: Path, *, blocks: int = 3, external: bool = False, seed: int = 0) -> Path:
    """An embedding, equal residual blocks and a final scale: input_ids, attention_mask -> last_hidden_state."""
    random = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((random.standard_normal(shape) / 4).astype(np.float32), name)

    weights = [weight("table", ROWS, WIDTH), weight("scale", WIDTH, WIDTH)]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["float_mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float_mask", "last_axis"], ["wide_mask"]),
    ]
    state = "rows"
    for number in range(blocks):
        weights += [weight(f"w{number}", WIDTH, WIDTH), weight(f"b{number}", WIDTH)]
        names = [f"{name}{number}" for name in ("product", "sum", "active", "masked", "state")]
        nodes += [
            helper.make_node("MatMul", [state, f"w{number}"], [names[0]]),
            helper.make_node("Add", [names[0], f"b{number}"], [names[1]]),
            helper.make_node("Tanh", [names[1]], [names[2]]),
            helper.make_node("Mul", [names[2], "wide_mask"], [names[3]]),
            helper.make_node("Add", [names[3], state], [names[4]]),
        ]
        state = names[4]
    nodes.append(helper.make_node("MatMul", [state, "scale"], ["last_hidden_state"]))
    text = ["batch_size", "sequence_length"]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(name, TensorProto.INT64, text) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*text, WIDTH])],
        [*weights, numpy_helper.from_array(np.array([2]), "last_axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    location = f"{path.name}_data" if external else None
    onnx.save(model, path, save_as_external_data=external, location=location, size_threshold=256)
    return path


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_bert(folder: Path) -> Path:
    """A checkpoint for feature extraction."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(**_SMALL, vocab_size=100, max_position_embeddings=40)).save_pretrained(folder)
    return folder


def write_gpt2(folder: Path) -> Path:
    """A checkpoint for text generation."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=40)).save_pretrained(folder)
    return folder


def write_gguf(
    path: Path,
    add: Callable[[Any], object] | None = None,
    *,
    kinds: Mapping[str, str] | None = None,
    more_tokens: int = 0,
) -> Path:
    """A Llama with its tokenizer in one file, as llama.cpp writes it.

    Args:
        path: the file.
        add: gets the writer, and adds more.
        kinds: part of the name of a tensor -> its type in the file, where that is not F32.
        more_tokens: of the vocabulary, beside the letters and a few others.
    """
    import gguf

    width, heads, inner, layers = 32, 2, 64, 2
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab", "cd", *(f"<{number}>" for number in range(more_tokens))]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("toy")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for layer in range(layers):
        square = {f"blk.{layer}.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
        norms = {f"blk.{layer}.{name}_norm": (width,) for name in ("attn", "ffn")}
        wide = {f"blk.{layer}.ffn_{name}": (inner, width) for name in ("gate", "up")}
        shapes |= square | norms | wide | {f"blk.{layer}.ffn_down": (width, inner)}
    for name, shape in shapes.items():
        values = np.ones(shape) if name.endswith("norm") else random.standard_normal(shape) / 8
        kind = next((kind for part, kind in (kinds or {}).items() if part in name), "F32")
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quantize(values.astype(np.float32), type_), raw_dtype=type_)
    if add:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
