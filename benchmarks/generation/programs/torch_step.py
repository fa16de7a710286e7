"""One token of a model that is called as transformers' are."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.generation.programs.order import Step

__all__ = ["torch_step"]


def torch_step(model: Any) -> Step:
    """Steps that keep the model's KV caches."""
    cache: Any = None

    def step(new: list[int]) -> tuple[int, float]:
        nonlocal cache
        with torch.inference_mode():
            made = model(torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = made.past_key_values
        logprob, token = made.logits[0, -1].log_softmax(dim=-1).max(dim=-1)
        return int(token), float(logprob)

    return step
