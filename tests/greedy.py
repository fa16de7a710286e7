"""The greedy texts of transformers itself: the reference for pipeload's own generation.

    python -m tests.greedy FOLDER FILE.gguf OUT.npz

writes that of a GGUF file, in a process of its own, so that torch does not stay in that of the tests. The arrays are
named `plain.0`, `plain.1` ..., one for each of PROMPTS, and so on for each of VARIANTS.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

GREEDY_NAME = "greedy.npz"
NEW_TOKENS = 64
PROMPTS = ((3, 141, 59, 26, 535), (897,), (93, 238, 46, 264, 338, 327, 95, 28))
"""Of different lengths, so that a batch of them is padded."""

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "processed": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 40},
}
"""Name -> arguments of `generate`, the same ones there and here."""


def write_continuations(model: Any, path: Path) -> None:
    """The new tokens that a model of transformers makes of each prompt, one at a time."""
    import torch

    found = {}
    for variant, options in VARIANTS.items():
        for number, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
            found[f"{variant}.{number}"] = made[0, len(prompt) :].numpy()
    np.savez(path, **found)


def main() -> int:
    """Write the reference of a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from pipeload_export.source.gguf import reading_once

    folder, name, out = sys.argv[1:]
    with reading_once():
        # As from_pretrained does, which needs the package accelerate.
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, gguf_file=name)).eval()
        tensors = load_gguf_checkpoint(str(Path(folder, name)), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    write_continuations(model, Path(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
