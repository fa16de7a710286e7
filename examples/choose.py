"""Let a language model choose between words: a logits processor leaves no others."""

import numpy as np
from tokenizers import Tokenizer

import pipeload

DIRECTORY = "models/exported/smollm2-135m"
KINDS = [" fish", " bird", " tree", " tool"]
ALLOWED = [Tokenizer.from_file(f"{DIRECTORY}/tokenizer.json").encode(word).ids[0] for word in KINDS]


def only_allowed(token_ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Takes and returns logits, float32 `[batch, vocabulary]`."""
    masked = np.full_like(logits, -np.inf)
    masked[:, ALLOWED] = logits[:, ALLOWED]
    return masked


with pipeload.load(DIRECTORY, memory_budget="256MB") as model:
    for name in ("salmon", "hammer", "oak", "eagle"):
        prompt = f"A {name} is a kind of"
        print(prompt + model.generate(prompt, max_new_tokens=1, logits_processor=[only_allowed]).text)
