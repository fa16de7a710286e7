"""Named entities: neighbouring tokens of one label, out of a token classifier's logits.

The grouping is that of transformers' token-classification pipeline:
```
none      each token is an entity, its label with the prefix of the tag: B-PER
simple    neighbouring tokens of one tag
first     neighbouring words of one tag; a word has the label of its first token,
average   that of the mean of its tokens' scores,
max       or that of the token with the largest score
```
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeload.tasks.classify.labels import Label, softmax
from pipeload.tasks.model_files import ModelConfig
from pipeload.tasks.text.tokenizer import Encoded, Tokenizer

__all__ = ["Aggregation", "Entity", "entities"]

Aggregation = Literal["none", "simple", "first", "average", "max"]

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
    scores: NDArray[np.float32]
    word: str
    start: int
    end: int
    continues: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A token, or the tokens of a word, with one label."""

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
    logits: NDArray[np.float32],
    text: str,
    encoded: Encoded,
    tokenizer: Tokenizer,
    config: ModelConfig,
    strategy: Aggregation,
) -> list[Entity]:
    """The entities of one text, in its order.

    Args:
        logits: `[tokens, labels]`, without padding.
        text: the text.
        encoded: its tokens.
        tokenizer: the tokenizer that made them.
        config: names the labels.
        strategy: how tokens become entities.
    """
    words: list[list[_Token]] = []
    for token in _tokens(softmax(logits), text, encoded, tokenizer):
        if words and token.continues and strategy not in ("none", "simple"):
            words[-1].append(token)
        else:
            words.append([token])
    parts = [_part(word, tokenizer, config, strategy) for word in words]
    if strategy == "none":
        found = [_entity(part.label, [part], part.word) for part in parts]
    else:
        groups: list[list[_Part]] = []
        for part in parts:
            if groups and groups[-1][-1].tag == part.tag and not part.label.startswith("B-"):
                groups[-1].append(part)
            else:
                groups.append([part])
        found = [
            _entity(group[0].label.split("-", 1)[-1], group, tokenizer.join([part.word for part in group]))
            for group in groups
        ]
    return [entity for entity in found if entity.label != _OUTSIDE]


def _tokens(probabilities: NDArray[np.float32], text: str, encoded: Encoded, tokenizer: Tokenizer) -> Iterator[_Token]:
    for scores, id_, special, start, end in zip(
        probabilities, encoded.ids, encoded.special, encoded.begins, encoded.ends, strict=True
    ):
        if not special:
            unknown = id_ == tokenizer.unknown_id
            yield _Token(
                scores=scores,
                # Text outside the vocabulary is shown as it stands in the text.
                word=text[start:end] if unknown else tokenizer.token(id_),
                start=start,
                end=end,
                continues=not unknown and tokenizer.continues_word(id_, text, start, end),
            )


def _part(tokens: Sequence[_Token], tokenizer: Tokenizer, config: ModelConfig, strategy: Aggregation) -> _Part:
    if strategy == "average":
        scores = np.mean([token.scores for token in tokens], axis=0)
    elif strategy == "max":
        scores = max((token.scores for token in tokens), key=np.max)
    else:
        scores = tokens[0].scores
    best = int(scores.argmax())
    words = [token.word for token in tokens]
    return _Part(
        label=config.label(best),
        score=float(scores[best]),
        word=words[0] if strategy in ("none", "simple") else tokenizer.join(words),
        start=tokens[0].start,
        end=tokens[-1].end,
    )


def _entity(label: str, parts: Sequence[_Part], word: str) -> Entity:
    return Entity(
        label=label,
        score=float(np.mean([part.score for part in parts])),
        word=word,
        start=parts[0].start,
        end=parts[-1].end,
    )
