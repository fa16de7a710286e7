"""Labels for texts and images, and entities within texts, depending on the model's task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError
from pipeload.tasks.arguments import check_positive
from pipeload.tasks.classify.entities import entities
from pipeload.tasks.classify.labels import Label, scores, top_labels
from pipeload.tasks.images import Image, image_processor_of
from pipeload.tasks.runner import Array, Runner, config_of, graph_inputs, made_by_model
from pipeload.tasks.text.padding import WINDOW, apart, in_batches
from pipeload.tasks.text.tokenizer import tokenizer_of

__all__ = ["BATCH_SIZE", "TOP_K", "classify"]

BATCH_SIZE = 32
"""The most texts or images in one pass, unless the caller sets another number."""

TOP_K = 5
"""The number of labels for each text or image, unless the caller sets another."""

Input = TypeVar("Input", bound=Image)


@overload
def classify(runner: Runner, inputs: Image, *, top_k: int | None = ..., batch_size: int = ...) -> list[Label]: ...
@overload
def classify(
    runner: Runner,
    inputs: list[Input] | tuple[Input, ...],
    *,
    top_k: int | None = ...,
    batch_size: int = ...,
) -> list[list[Label]]: ...
def classify(
    runner: Runner,
    inputs: Image | list[Input] | tuple[Input, ...],
    *,
    top_k: int | None = TOP_K,
    batch_size: int = BATCH_SIZE,
) -> list[Label] | list[list[Label]]:
    """The labels of each text or image, best first; for one input a list, for several a list of lists.

    A token classifier returns the `Entity`s of a text in their order, instead of the best labels. Texts longer than the
    model accepts are cut, with a TruncationWarning.

    Args:
        runner: a model exported for text-classification, token-classification or image-classification.
        inputs: texts; or images: a path, the bytes of a file, a Pillow image, or uint8 `[height, width, 3]`.
        top_k: the most labels for each input, None for all. A token classifier ignores it.
        batch_size: the most inputs in one pass; a pass takes fewer if the memory budget cannot hold this many.

    Raises:
        ConfigError: the model is no classifier, or an input or argument is invalid.
        ShardError: a file of the tokenizer or of the image processor is damaged.
        BudgetError: not even a single input fits into the memory budget.

    Example:
        >>> with pipeload.load("models/exported/vit", "256MB") as model:
        ...     model.classify("cat.jpg")[0]
        Label(label='tabby, tabby cat', score=0.87)
    """
    if top_k is not None:
        check_positive("top_k", top_k)
    task = runner.manifest.task
    if task not in ("text-classification", "token-classification", "image-classification"):
        raise ConfigError(
            f"classify takes a model for text-, token- or image-classification; this one is for {task}. "
            "Export it with --task, or use model.run."
        )
    batch: Sequence[Image] = inputs if isinstance(inputs, list | tuple) else [inputs]
    if task == "image-classification":
        results = _images(runner, batch, top_k, batch_size)
    else:
        results = _texts(runner, batch, top_k, batch_size, task == "token-classification")
    return results if isinstance(inputs, list | tuple) else results[0]


def _texts(
    runner: Runner, texts: Sequence[Any], top_k: int | None, batch_size: int, by_token: bool
) -> list[list[Label]]:
    if len(texts) > WINDOW:
        parts = (texts[i : i + WINDOW] for i in range(0, len(texts), WINDOW))
        return [labels for part in parts for labels in _texts(runner, part, top_k, batch_size, by_token)]
    config, tokenizer = config_of(runner), tokenizer_of(runner)
    rows = tokenizer.encode_all(texts)
    results: dict[int, list[Label]] = {}

    def run(indices: list[int]) -> None:
        arrays = tokenizer.batch([rows[index] for index in indices])
        logits = _logits(runner, arrays)
        with made_by_model("logits", logits):
            if by_token:
                for index, row, mask in zip(indices, logits, arrays["attention_mask"] != 0, strict=True):
                    results[index] = [*entities(row[mask], texts[index], rows[index], tokenizer, config)]
            else:
                for index, row in zip(indices, scores(logits, config.problem_type), strict=True):
                    results[index] = top_labels(row, config, top_k)

    in_batches([len(row.ids) for row in rows], batch_size, run, alone=apart(runner.manifest, tokenizer.padding_side))
    return [results[index] for index in range(len(rows))]


def _images(runner: Runner, images: Sequence[Image], top_k: int | None, batch_size: int) -> list[list[Label]]:
    config, processor = config_of(runner), image_processor_of(runner)
    results: dict[int, list[Label]] = {}

    def run(indices: list[int]) -> None:
        logits = _logits(runner, {"pixel_values": processor.batch([images[index] for index in indices])})
        with made_by_model("logits", logits):
            for index, row in zip(indices, scores(logits, config.problem_type), strict=True):
                results[index] = top_labels(row, config, top_k)

    in_batches([0] * len(images), batch_size, run, alone=runner.manifest.quantised_dynamically)
    return [results[index] for index in range(len(images))]


def _logits(runner: Runner, offered: Mapping[str, Array]) -> NDArray[np.float32]:
    outputs = runner.run(graph_inputs(runner, offered))
    if "logits" not in outputs:
        raise ConfigError(f"The model makes no output 'logits', only {', '.join(outputs)}. Use model.run.")
    return outputs["logits"].astype(np.float32, copy=False)
