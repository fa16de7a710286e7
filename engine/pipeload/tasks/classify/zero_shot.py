"""Labels that the caller names: a model of natural language inference says whether the text entails each of them.

The rule is that of transformers' zero-shot-classification pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError, RunError
from pipeload.foreign import foreign_errors
from pipeload.tasks.arguments import check_several
from pipeload.tasks.classify.classify import BATCH_SIZE
from pipeload.tasks.classify.labels import Label, softmax
from pipeload.tasks.classify.logits import check_scores_texts, text_logits
from pipeload.tasks.model_files import ModelConfig
from pipeload.tasks.runner import Runner, config_of
from pipeload.tasks.text.pairs import check_text

__all__ = ["HYPOTHESIS", "zero_shot"]

HYPOTHESIS = "This example is {}."
"""The sentence that a label completes, as in transformers."""


@overload
def zero_shot(
    self: Runner,
    texts: str,
    candidate_labels: Sequence[str],
    *,
    hypothesis_template: str = ...,
    multi_label: bool = ...,
    batch_size: int = ...,
) -> list[Label]: ...
@overload
def zero_shot(
    self: Runner,
    texts: list[str],
    candidate_labels: Sequence[str],
    *,
    hypothesis_template: str = ...,
    multi_label: bool = ...,
    batch_size: int = ...,
) -> list[list[Label]]: ...
def zero_shot(
    self: Runner,
    texts: str | list[str],
    candidate_labels: Sequence[str],
    *,
    hypothesis_template: str = HYPOTHESIS,
    multi_label: bool = False,
    batch_size: int = BATCH_SIZE,
) -> list[Label] | list[list[Label]]:
    """The candidate labels with their probabilities, best first; for one text a list, for several a list of lists.

    Each label costs a pass over the text, in batches.

    Args:
        self: a model for text-classification that was trained for natural language inference (NLI).
        texts: one text or several.
        candidate_labels: the labels to choose from.
        hypothesis_template: a sentence with `{}` where the label goes; the model is asked whether the text entails it.
        multi_label: each label holds or not, independently of the others; otherwise the scores add up to 1.
        batch_size: the most pairs of text and label in one pass.

    Raises:
        ConfigError: the model has no label for entailment, or an argument is invalid.
        ShardError: a file of the tokenizer is damaged.
        BudgetError: not even a single pair fits into the memory budget.

    Example:
        >>> with pipeload.load("models/nli", "256MB") as model:
        ...     model.zero_shot("My screen is broken", ["phone", "garden"])[0].label
        'phone'
    """
    check_scores_texts(self, "zero_shot")
    several = [texts] if isinstance(texts, str) else texts
    check_several(several)
    # A text of several labels with commas between them, as transformers takes it.
    labels = candidate_labels.split(",") if isinstance(candidate_labels, str) else candidate_labels
    check_several(labels, "candidate_labels", "a sequence of strings")
    labels = [label.strip() if isinstance(label, str) else label for label in labels]
    for label in labels:
        check_text(label)
    if not labels:
        raise ConfigError("candidate_labels is empty. Give at least one label.")
    if not isinstance(hypothesis_template, str) or "{}" not in hypothesis_template:
        raise ConfigError(
            f"hypothesis_template must be a sentence with {{}} in place of the label, not {hypothesis_template!r:.80}."
        )
    entailment, contradiction = _classes(config_of(self))
    pairs = [(text, hypothesis_template.replace("{}", label)) for text in several for label in labels]
    rows = text_logits(self, pairs, batch_size)
    with foreign_errors(RunError, f"The scores of {len(pairs)} pairs could not be put together", "Pass fewer texts."):
        logits = np.array(rows, np.float32).reshape(len(several), len(labels), -1)
        if multi_label or len(labels) == 1:
            scores = softmax(logits[..., [contradiction, entailment]])[..., 1]
        else:
            scores = softmax(logits[..., entailment])
    found = [_best_first(row, labels) for row in scores]
    return found[0] if isinstance(texts, str) else found


def _classes(config: ModelConfig) -> tuple[int, int]:
    """The indices of entailment and contradiction: the first or, where that is entailment, the last."""
    config.require("id2label")
    for index, name in sorted(config.id2label.items()):
        if name.lower().startswith("entail"):
            return index, -1 if index == 0 else 0
    known = ", ".join(config.id2label.values()) or "no names"
    raise ConfigError(
        f"zero_shot takes a model with a label for entailment, and the labels of this one are: {known:.200}. "
        "Take a model that was trained for natural language inference (NLI)."
    )


def _best_first(row: NDArray[np.float32], labels: Sequence[str]) -> list[Label]:
    order = np.argsort(-row, kind="stable")
    return [Label(labels[int(index)], float(row[index])) for index in order]
