"""AirLLM, which splits a checkpoint into layers when it opens it for the first time."""

from __future__ import annotations

from importlib.metadata import version

import torch
from airllm.airllm_base import AirLLMBaseModel

from benchmarks.generation.programs.order import Step, decode, read_order, tell
from benchmarks.generation.programs.torch_step import torch_step

ORDER = read_order()


class GPT2(AirLLMBaseModel):
    """GPT-2 in AirLLM's terms."""

    def set_layer_names_dict(self) -> None:
        """The names, in the checkpoint, of the modules that are streamed and of those that are not."""
        self.layer_names_dict = {
            "embed": "transformer.wte",
            "layer_prefix": "transformer.h",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
            "resident": ["transformer.wpe"],
        }

    def get_tokenizer(self, hf_token: str | None = None) -> None:
        """None: prompts are token ids."""


def open_model() -> Step:
    torch.set_num_threads(ORDER.threads)
    return torch_step(GPT2(ORDER.model, device="cpu", dtype=torch.float32))


if __name__ == "__main__":
    tell(decode(ORDER, open_model, f"airllm {version('airllm')}, transformers {version('transformers')}"))
