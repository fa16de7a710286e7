"""AirLLM, which splits a checkpoint into layers when it opens it for the first time."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from airllm.airllm_base import AirLLMBaseModel

from benchmarks.generation.programs.order import Step, decode, read_order, tell

ORDER = read_order()


class GPT2(AirLLMBaseModel):
    """GPT-2 in AirLLM's terms."""

    def set_layer_names_dict(self) -> None:
        """Where what is streamed, and what is not, is found in the checkpoint."""
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
    model = GPT2(ORDER.model, device="cpu", dtype=torch.float32)
    cache: Any = None

    def step(new: list[int]) -> tuple[int, float]:
        nonlocal cache
        with torch.inference_mode():
            made = model(torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = made.past_key_values
        logprob, token = made.logits[0, -1].log_softmax(dim=-1).max(dim=-1)
        return int(token), float(logprob)

    return step


if __name__ == "__main__":
    tell(decode(ORDER, open_model, f"airllm {version('airllm')}, transformers {version('transformers')}"))
