"""A checkpoint of GPT-J's shape: seeded weights of bfloat16, made and written layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeload_export.source.catalog import SeededRecipe, recipe

__all__ = ["write_checkpoint"]

_NAME = "gpt-j-6b"
_SEED = 20261129
_SCALE = 0.02


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write it as transformers does, a file for each layer. Returns the bytes of its weights."""
    import torch
    import transformers
    from safetensors.torch import save_file

    shape = recipe(_NAME)
    assert isinstance(shape, SeededRecipe)
    config = transformers.GPTJConfig(**shape.model.config | {"n_layer": layers}, torch_dtype="bfloat16")
    config.architectures = ["GPTJForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.GPTJForCausalLM(config)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(name.rpartition(".h.")[2].split(".")[0], {})[name] = parameter
    places = {}
    for number, parameters in enumerate(groups.values()):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = dict(_values(parameters, _SEED + number))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
    nbytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    index = {"metadata": {"total_size": nbytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return nbytes


def _values(parameters: dict[str, Any], seed: int) -> Iterator[tuple[str, Any]]:
    import torch

    random = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        if parameter.dim() > 1:
            yield name, (torch.randn(parameter.shape, generator=random) * _SCALE).bfloat16()
        else:
            yield name, torch.full(parameter.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
