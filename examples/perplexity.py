"""How well a language model predicts a text: `python examples/perplexity.py FILE`; the lower, the better."""

import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import pipeload

DIRECTORY = Path("models/exported/smollm2-135m")

ids = np.array([Tokenizer.from_file(str(DIRECTORY / "tokenizer.json")).encode(Path(sys.argv[1]).read_text()).ids])
with pipeload.load(DIRECTORY, memory_budget="400MB") as model:
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
    }
    logits = model.run(inputs)["logits"][0, :-1].astype(np.float64)  # [tokens - 1, vocabulary]
shifted = logits - logits.max(1, keepdims=True)
chosen = np.take_along_axis(shifted, ids[0, 1:, None], 1)[:, 0] - np.log(np.exp(shifted).sum(1))
print(f"{ids.shape[1]} tokens, perplexity {np.exp(-chosen.mean()):.1f}")
