"""Documents in the order in which they answer a query, by a model that scores pairs (a cross-encoder)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeload.errors import ConfigError, RunError
from pipeload.foreign import foreign_errors
from pipeload.tasks.arguments import check_positive, check_several
from pipeload.tasks.classify.classify import BATCH_SIZE
from pipeload.tasks.classify.labels import sigmoid
from pipeload.tasks.classify.logits import check_scores_texts, text_logits
from pipeload.tasks.runner import Runner, config_of
from pipeload.tasks.text.pairs import check_text

__all__ = ["Ranked", "rerank"]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document and its score for a query.

    Attributes:
        index: its place in the list that was given.
        score: the larger, the better it answers the query.
        text: the document.
    """

    __module__ = "pipeload"

    index: int
    score: float
    text: str


def rerank(
    self: Runner,
    query: str,
    documents: Sequence[str],
    *,
    top_k: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[Ranked]:
    """The documents, best first, as `CrossEncoder.rank` of sentence-transformers orders them.

    Scores are the model's single logit through the activation that its `config.json` names for sentence-transformers,
    or else through a sigmoid. Pairs longer than the model accepts are cut, with a TruncationWarning.

    Args:
        self: a model for text-classification with one score: a reranker, or cross-encoder.
        query: what is asked.
        documents: the texts to order.
        top_k: the most documents in the answer, None for all.
        batch_size: the most documents in one pass.

    Raises:
        ConfigError: the model has more than one score, or an argument is invalid.
        ShardError: a file of the tokenizer is damaged.
        BudgetError: not even a single pair fits into the memory budget.

    Example:
        >>> with pipeload.load("models/reranker", "256MB") as model:
        ...     best = model.rerank("How many people live in Berlin?", ["Berlin has 3.5 million people.", "A cat."])[0]
    """
    check_scores_texts(self, "rerank")
    check_text(query)
    check_several(documents, "documents", "a sequence of strings")
    if top_k is not None:
        check_positive("top_k", top_k)
    activation = config_of(self).pair_activation
    if activation not in ("Identity", "Sigmoid"):
        raise ConfigError(
            f"The model's scores go through '{activation}', which pipeload does not know. "
            "Take its logits from model.run."
        )
    rows = text_logits(self, [(query, document) for document in documents], batch_size)
    if not rows:
        return []
    if len(rows[0]) != 1:
        raise ConfigError(
            f"rerank takes a model with one score for a pair, and this one has {len(rows[0])} labels. "
            "Take a reranker (cross-encoder), or the label that you want from model.classify."
        )
    with foreign_errors(RunError, f"The scores of {len(rows)} documents could not be sorted", "Pass fewer documents."):
        values = np.concatenate(rows)
        if activation == "Sigmoid":
            values = sigmoid(values)
        order = np.argsort(-values, kind="stable")[:top_k]
    return [Ranked(int(index), float(values[index]), documents[int(index)]) for index in order]
