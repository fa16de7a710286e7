"""The likeliest tokens in the place of a mask, as the fill-mask pipeline of transformers finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError
from pipeload.tasks.arguments import check_positive, check_several
from pipeload.tasks.classify.labels import softmax
from pipeload.tasks.classify.logits import logits_of
from pipeload.tasks.runner import Array, Runner, made_by_model
from pipeload.tasks.text.batches import by_rows, in_windows
from pipeload.tasks.text.tokenizer import Encoded, Tokenizer, tokenizer_of

__all__ = ["FilledMask", "fill_mask"]

_BATCH_SIZE = 32
_TOP_K = 5


@dataclass(frozen=True, slots=True)
class FilledMask:
    """A token in the place of a mask.

    Attributes:
        score: its probability.
        token: its id.
        token_str: its text.
        sequence: the whole text with it.
    """

    __module__ = "pipeload"

    score: float
    token: int
    token_str: str
    sequence: str


@overload
def fill_mask(self: Runner, texts: str, *, top_k: int = ..., batch_size: int = ...) -> list[FilledMask]: ...
@overload
def fill_mask(self: Runner, texts: list[str], *, top_k: int = ..., batch_size: int = ...) -> list[list[FilledMask]]: ...
def fill_mask(self: Runner, texts: str | list[str], *, top_k: int = _TOP_K, batch_size: int = _BATCH_SIZE) -> Any:
    """The likeliest tokens in the place of the mask, best first; for one text a list, for several a list of lists.

    A text with several masks has such a list for each of them instead, filled as if the others stayed.

    Args:
        self: a model exported for fill-mask.
        texts: one text or several, each with the model's mask token (`[MASK]`, `<mask>`) in the place to fill.
        top_k: the most tokens for each mask.
        batch_size: the most texts in one pass; a pass takes fewer if the memory budget cannot hold this many.

    Raises:
        ConfigError: the model fills no masks, a text has none, or an argument is invalid.
        ShardError: a file of the tokenizer is damaged.
        BudgetError: not even a single text fits into the memory budget.

    Example:
        >>> with pipeload.load("models/bert-base", "256MB") as model:
        ...     model.fill_mask("Paris is the capital of [MASK].")[0].token_str
        'france'
    """
    task = self.manifest.task
    if task != "fill-mask":
        raise ConfigError(
            f"fill_mask takes a model for fill-mask; this one is for {task}. "
            "Export it with --task fill-mask, or use model.run."
        )
    check_positive("top_k", top_k)
    several = [texts] if isinstance(texts, str) else texts
    check_several(several)
    tokenizer = tokenizer_of(self)
    mask_id = tokenizer.mask_id
    if mask_id is None:
        raise ConfigError(
            "The model's tokenizer_config.json names no mask_token, so no text can have one. Use model.run."
        )
    results = in_windows(several, lambda part: _fill(self, tokenizer, part, mask_id, top_k, batch_size))
    return results[0] if isinstance(texts, str) else results


def _fill(
    runner: Runner, tokenizer: Tokenizer, texts: Sequence[str], mask_id: int, top_k: int, batch_size: int
) -> list[Any]:
    rows = tokenizer.encode_all(texts)
    for text, row in zip(texts, rows, strict=True):
        if mask_id not in row.ids:
            raise ConfigError(
                f"The text has no mask: {text!r:.80}. Write {tokenizer.token(mask_id)} in the place to fill"
                f"{', within the first ' + str(len(row.ids)) + ' tokens' if row.cut else ''}."
            )

    def made(indices: Sequence[int], arrays: Mapping[str, Array], outputs: Mapping[str, Array]) -> list[Any]:
        logits = logits_of(outputs)
        with made_by_model("logits", logits):
            return [
                _filled(row[mask], rows[index], tokenizer, top_k)
                for index, row, mask in zip(indices, logits, arrays["attention_mask"] != 0, strict=True)
            ]

    return by_rows(runner, rows, batch_size, made)


def _filled(logits: NDArray[np.float32], row: Encoded, tokenizer: Tokenizer, top_k: int) -> Any:
    """The best tokens for each mask of one text; with one mask, not in a list of their own."""
    places = [place for place, id_ in enumerate(row.ids) if id_ == tokenizer.mask_id]
    found = []
    for place in places:
        probabilities = softmax(logits[place])
        filled = []
        for token in np.argsort(-probabilities, kind="stable")[:top_k].tolist():
            ids = [*row.ids[:place], token, *row.ids[place + 1 :]]
            # Without special tokens, the other masks would be missing.
            sequence = tokenizer.decode(ids, special=len(places) > 1)
            filled.append(
                FilledMask(float(probabilities[token]), token, tokenizer.decode([token], special=True), sequence)
            )
        found.append(filled)
    return found[0] if len(found) == 1 else found
