"""transformers with weights that accelerate offloads to the disk: all, or those that are not told to stay."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

from benchmarks.generation.programs.order import Step, decode, read_order, tell
from benchmarks.generation.programs.torch_step import torch_step

ORDER = read_order()


def on_disk() -> Any:
    """Every weight is read where it lies, each time that it is needed."""
    folder = Path(ORDER.model)
    files = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    index = {
        name: {"safetensors_file": str(folder / file), "weight_name": name, "dtype": "float32"}
        for name, file in files.items()
    }
    # Tied, and so not in the checkpoint a second time.
    index["lm_head.weight"] = index["transformer.wte.weight"]
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    return accelerate.dispatch_model(model, {"": "disk"}, main_device="cpu", offload_index=index, force_hooks=True)


def partly_resident() -> Any:
    """What stays is chosen by accelerate."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        ORDER.model,
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": ORDER.resident_bytes},
        # Weights in safetensors are read where they lie; the folder stays empty.
        offload_folder=tempfile.gettempdir(),
    )
    if ORDER.copied:
        for weight in model.parameters():
            if weight.device.type == "cpu":
                weight.data = weight.data.clone()
    return model


def open_model() -> Step:
    torch.set_num_threads(ORDER.threads)
    return torch_step(partly_resident().eval() if ORDER.resident_bytes else on_disk().eval())


if __name__ == "__main__":
    tell(decode(ORDER, open_model, f"accelerate {accelerate.__version__}, transformers {transformers.__version__}"))
