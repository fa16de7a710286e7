"""Scores and names of classes, out of a classifier's logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeload.tasks.model_files import ModelConfig

__all__ = ["Label", "scores", "sigmoid", "softmax", "top_labels"]


@dataclass(frozen=True, slots=True)
class Label:
    """A class and its score.

    Attributes:
        label: the name of the class.
        score: a probability; for a model that was trained for regression, the value.
    """

    __module__ = "pipeload"

    label: str
    score: float


def scores(logits: NDArray[np.float32], problem_type: str | None) -> NDArray[np.float32]:
    """Scores `[..., classes]` from logits of that shape.

    The rule is that of transformers' pipelines: regression returns the values, several labels at once or a
    single label take the sigmoid, and one label of several takes the softmax.
    """
    if problem_type == "regression":
        return logits
    if problem_type == "multi_label_classification" or logits.shape[-1] == 1:
        return sigmoid(logits)
    return softmax(logits)


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The sigmoid of each logit, in a form that does not overflow."""
    return np.exp(-np.logaddexp(np.float32(0), -logits))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities over the last axis."""
    powers: NDArray[np.float32] = np.exp(logits - logits.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


def top_labels(row: NDArray[np.float32], config: ModelConfig, top_k: int | None) -> list[Label]:
    """The best classes of one row of scores `[classes]`, best first; all of them if `top_k` is None."""
    order = np.argsort(-row, kind="stable")[:top_k]
    return [Label(config.label(int(index)), float(row[index])) for index in order]
