"""The seeded weights of GPT-2 XL in the form that each engine reads.

```
catalog:gpt2-xl --> models/exported/gpt2-xl              pipeload's shards
                '-> models/exported/gpt2-xl-checkpoint   safetensors, as transformers saves them (accelerate)
                    '-> models/exported/gpt2-xl.gguf     fp32 (llama.cpp)
                    '-> models/exported/gpt2-xl-airllm   a file for each layer, split by AirLLM itself
catalog:gpt2-xl-bf16 -> models/exported/gpt2-xl-bf16-checkpoint
                        '-> gpt2-xl-bf16-int4, -int8              pipeload's shards
                        '-> gpt2-xl-bf16.Q4_0.gguf, .Q8_0.gguf    llama.cpp
```

What is there is left as it is.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from rich.console import Console
from safetensors import safe_open

from benchmarks.generation.limited import python_of, run_program
from benchmarks.models import ROOT, exported
from pipeload.errors import RunError
from pipeload_export import Weights, export
from pipeload_export.source.catalog import SeededRecipe, recipe
from pipeload_export.source.tracer import seeded_model

__all__ = ["MODEL", "airllm_layers", "checkpoint", "gguf_file", "rounded_shards", "shards"]

MODEL = "gpt2-xl"
_FOLDER = ROOT / "models" / "exported"
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""transformers stores these `[in, out]`, everybody else `[out, in]`."""
_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def shards(console: Console) -> Path:
    """The sharded model directory."""
    return exported(MODEL, console)[0]


def rounded_shards(name: str, weights: Weights, console: Console) -> Path:
    """The sharded model directory of a checkpoint, its weights rounded. The unsplit graph is not kept."""
    source = checkpoint(console, name)

    def write(target: Path) -> None:
        export(source, target, weights=weights)

    return _made(_FOLDER / f"{name}-{weights}", write, console)


def checkpoint(console: Console, name: str = MODEL) -> Path:
    """A checkpoint folder as transformers writes it; made from the same seed as the shards."""
    found = recipe(name)
    assert isinstance(found, SeededRecipe)

    def write(target: Path) -> None:
        import torch

        seeded_model(found.model).to(getattr(torch, found.model.dtype)).save_pretrained(target, max_shard_size="1GB")

    return _made(_FOLDER / f"{name}-checkpoint", write, console)


def gguf_file(console: Console, name: str = MODEL, kind: str = "F32") -> Path:
    """The checkpoint as GGUF, without a tokenizer; its products in blocks of a type, and its tables in Q8_0."""

    def write(target: Path) -> None:
        _write_gguf(checkpoint(console, name), target, gguf.GGMLQuantizationType[kind])

    return _made(_FOLDER / (f"{name}.gguf" if kind == "F32" else f"{name}.{kind}.gguf"), write, console)


def airllm_layers(console: Console, environments: Path) -> Path:
    """The checkpoint with its layers in files of their own; AirLLM, which splits it, also reads its config there."""
    source = checkpoint(console)

    def write(target: Path) -> None:
        target.mkdir()
        # Links: AirLLM writes its layers beside the checkpoint.
        for file in source.iterdir():
            (target / file.name).hardlink_to(file)
        order = {"model": str(target), "prompt": [0], "tokens": 0, "threads": 2}
        done = run_program("airllm_tokens", order, python=python_of("airllm", environments), files=[])
        if done.answer is None:
            raise RunError(f"AirLLM could not split {source}: {done.message}")

    return _made(_FOLDER / f"{MODEL}-airllm", write, console)


def _made(target: Path, write: Callable[[Path], None], console: Console) -> Path:
    """The target; written under another name first, so that a target that exists is complete."""
    if not target.exists():
        console.print(f"Writing {target.relative_to(ROOT)} ...")
        part = target.with_name(f"{target.name}.part")
        if part.is_dir():
            shutil.rmtree(part)
        write(part)
        part.rename(target)
    return target


def _write_gguf(source: Path, target: Path, kind: gguf.GGMLQuantizationType) -> None:
    config = json.loads((source / "config.json").read_bytes())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    where = json.loads((source / "model.safetensors.index.json").read_bytes())["weight_map"]
    writer = gguf.GGUFWriter(target, "gpt2")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(_FILE_TYPES[kind.name])
    writer.add_tokenizer_model("no_vocab")
    for name, file in where.items():
        with safe_open(source / file, framework="numpy") as weights:
            shape = weights.get_slice(name).get_shape()
        if name.endswith(_TRANSPOSED):
            shape.reverse()
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        own = _kind_of(name, shape, kind)
        size, nbytes = gguf.GGML_QUANT_SIZES[own]
        if own is gguf.GGMLQuantizationType.F32:
            writer.add_tensor_info(known, shape, np.dtype(np.float32), 4 * math.prod(shape))
        else:
            stored = [*shape[:-1], shape[-1] // size * nbytes]
            writer.add_tensor_info(known, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, file in where.items():
        # numpy has no bfloat16.
        with safe_open(source / file, framework="pt") as weights:
            tensor = weights.get_tensor(name).float().numpy()
        tensor = tensor.T.copy() if name.endswith(_TRANSPOSED) else tensor
        own = _kind_of(name, tensor.shape, kind)
        writer.write_tensor_data(tensor if own is gguf.GGMLQuantizationType.F32 else quantize(tensor, own))
    writer.close()


def _kind_of(name: str, shape: Sequence[int], kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """The type of a tensor: vectors and positions stay floats; the vocabulary, which is the head too, has 8 bits."""
    if kind is gguf.GGMLQuantizationType.F32 or len(shape) < 2 or name.endswith("wpe.weight"):
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType.Q8_0 if name.endswith("wte.weight") else kind
