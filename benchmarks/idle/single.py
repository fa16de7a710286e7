"""The usual start: a process that imports ONNX Runtime, opens one session over a whole model, and answers once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

__all__ = ["main"]


def main(folder: Path, text: str) -> None:
    """Print the vector of a text, or the first token that follows it, as JSON."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    ids = tokenizer.encode(text).ids
    known = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "token_type_ids": np.zeros((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
    }
    feeds: dict[str, Any] = {}
    for wanted in session.get_inputs():
        # Caches are empty.
        sizes = {"batch_size": 1, "past_sequence_length": 0}
        feeds[wanted.name] = known.get(wanted.name)
        if feeds[wanted.name] is None:
            feeds[wanted.name] = np.zeros([sizes.get(size, size) for size in wanted.shape], np.float32)
    name = session.get_outputs()[0].name
    (output,) = session.run([name], feeds)
    if name == "logits":
        print(json.dumps(tokenizer.decode([int(output[0, -1].argmax())])))
    else:
        print(json.dumps(output[0].mean(axis=0).tolist()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
