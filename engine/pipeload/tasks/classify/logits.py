"""Logits of texts, and of pairs of texts, from a model for text-classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError
from pipeload.tasks.runner import Array, Runner, made_by_model
from pipeload.tasks.text.batches import by_rows, in_windows
from pipeload.tasks.text.pairs import TextOrPair
from pipeload.tasks.text.tokenizer import tokenizer_of

__all__ = ["check_scores_texts", "logits_of", "text_logits"]


def logits_of(outputs: Mapping[str, Array]) -> NDArray[np.float32]:
    """The output `logits` of one pass. Raises ConfigError if there is none."""
    if "logits" not in outputs:
        raise ConfigError(f"The model makes no output 'logits', only {', '.join(outputs)}. Use model.run.")
    return outputs["logits"].astype(np.float32, copy=False)


def text_logits(runner: Runner, texts: Sequence[TextOrPair], batch_size: int) -> list[NDArray[np.float32]]:
    """The logits `[classes]` of each text or pair; passes take them sorted by length."""

    def made(indices: Sequence[int], _: object, outputs: Mapping[str, Array]) -> list[NDArray[np.float32]]:
        logits = logits_of(outputs)
        with made_by_model("logits", logits):
            if logits.ndim != 2 or not logits.shape[1]:
                raise ValueError("it must be [texts, classes]")
            return [row for _, row in zip(indices, logits, strict=True)]

    tokenizer = tokenizer_of(runner)
    return in_windows(texts, lambda part: by_rows(runner, tokenizer.encode_all(part), batch_size, made))


def check_scores_texts(runner: Runner, caller: str) -> None:
    """Raise ConfigError unless the model is for text-classification."""
    task = runner.manifest.task
    if task != "text-classification":
        raise ConfigError(
            f"{caller} takes a model for text-classification; this one is for {task}. "
            "Export a model that was trained for it, or use model.run."
        )
