"""The seeded weights of GPT-2 XL in the form that each engine reads.

```
catalog:gpt2-xl --> models/exported/gpt2-xl              pipeload's shards
                '-> models/exported/gpt2-xl-checkpoint   safetensors, as transformers saves them (accelerate)
                    '-> models/exported/gpt2-xl.gguf     fp32 (llama.cpp)
                    '-> models/exported/gpt2-xl-airllm   a file for each layer, split by AirLLM itself
```

What is there is left as it is.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from rich.console import Console
from safetensors import safe_open

from benchmarks.generation.limited import python_of, run_program
from benchmarks.models import ROOT, exported
from pipeload.errors import RunError
from pipeload_export.source.catalog import SeededRecipe, recipe
from pipeload_export.source.tracer import seeded_model

__all__ = ["MODEL", "airllm_layers", "checkpoint", "gguf_file", "shards"]

MODEL = "gpt2-xl"
_FOLDER = ROOT / "models" / "exported"
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""transformers stores these `[in, out]`, everybody else `[out, in]`."""


def shards(console: Console) -> Path:
    """The sharded model directory."""
    return exported(MODEL, console)[0]


def checkpoint(console: Console) -> Path:
    """A checkpoint folder as transformers writes it; made from the same seed as the shards."""
    found = recipe(MODEL)
    assert isinstance(found, SeededRecipe)

    def write(target: Path) -> None:
        seeded_model(found.model).save_pretrained(target, max_shard_size="1GB")

    return _made(_FOLDER / f"{MODEL}-checkpoint", write, console)


def gguf_file(console: Console) -> Path:
    """The checkpoint as fp32 GGUF, without a tokenizer."""
    source = checkpoint(console)
    return _made(_FOLDER / f"{MODEL}.gguf", lambda target: _write_gguf(source, target), console)


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


def _write_gguf(source: Path, target: Path) -> None:
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
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    for name, file in where.items():
        with safe_open(source / file, framework="numpy") as weights:
            shape = weights.get_slice(name).get_shape()
        if name.endswith(_TRANSPOSED):
            shape.reverse()
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor_info(known, shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, file in where.items():
        with safe_open(source / file, framework="numpy") as weights:
            tensor = weights.get_tensor(name)
        writer.write_tensor_data(tensor.T.copy() if name.endswith(_TRANSPOSED) else tensor)
    writer.close()
