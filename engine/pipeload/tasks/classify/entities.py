"""Named entities: neighbouring tokens of one label, out of a token classifier's logits.

The grouping is that of transformers' token-classification pipeline with `aggregation_strategy="simple"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeload.tasks.classify.labels import Label, softmax
from pipeload.tasks.model_files import ModelConfig
from pipeload.tasks.text.tokenizer import Encoded, Tokenizer

__all__ = ["Entity", "entities"]

_OUTSIDE = "O"
"""The label of tokens that belong to no entity; such groups are left out."""


@dataclass(frozen=True, slots=True)
class Entity(Label):
    """A stretch of text with one label; the score is the mean over its tokens.

    Attributes:
        word: the tokens, joined by the tokenizer.
        start: the first character in the text.
        end: one past the last character.
    """

    __module__ = "pipeload"

    word: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Token:
    label: str
    score: float
    word: str
    start: int
    end: int

    @property
    def tag(self) -> str:
        """The label without the prefix that says whether an entity begins or continues here."""
        return self.label[2:] if self.label.startswith(("B-", "I-")) else self.label


def entities(
    logits: NDArray[np.float32], text: str, encoded: Encoded, tokenizer: Tokenizer, config: ModelConfig
) -> list[Entity]:
    """The entities of one text, in its order.

    Args:
        logits: `[tokens, labels]`, without padding.
        text: the text.
        encoded: its tokens.
        tokenizer: the tokenizer that made them.
        config: names the labels.
    """
    groups: list[list[_Token]] = []
    for token in _tokens(softmax(logits), text, encoded, tokenizer, config):
        if groups and groups[-1][-1].tag == token.tag and not token.label.startswith("B-"):
            groups[-1].append(token)
        else:
            groups.append([token])
    found = (_entity(group, tokenizer) for group in groups)
    return [entity for entity in found if entity.label != _OUTSIDE]


def _tokens(
    probabilities: NDArray[np.float32], text: str, encoded: Encoded, tokenizer: Tokenizer, config: ModelConfig
) -> list[_Token]:
    best = probabilities.argmax(axis=-1)
    tokens = []
    for index, (id_, special, (start, end)) in enumerate(
        zip(encoded.ids, encoded.special, encoded.offsets, strict=True)
    ):
        if not special:
            tokens.append(
                _Token(
                    label=config.label(int(best[index])),
                    score=float(probabilities[index, best[index]]),
                    # Text outside the vocabulary is shown as it stands in the text.
                    word=text[start:end] if id_ == tokenizer.unknown_id else tokenizer.token(id_),
                    start=start,
                    end=end,
                )
            )
    return tokens


def _entity(group: Sequence[_Token], tokenizer: Tokenizer) -> Entity:
    return Entity(
        label=group[0].label.split("-", 1)[-1],
        score=float(np.mean([token.score for token in group])),
        word=tokenizer.join([token.word for token in group]),
        start=group[0].start,
        end=group[-1].end,
    )
