"""Labels for texts and images, and entities within texts, depending on the model's task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, overload

from pipeload.errors import ConfigError
from pipeload.tasks.arguments import check_positive, check_several
from pipeload.tasks.classify.entities import Aggregation, entities
from pipeload.tasks.classify.labels import Label, scores, top_labels
from pipeload.tasks.classify.logits import logits_of, text_logits
from pipeload.tasks.images import Image, image_processor_of
from pipeload.tasks.runner import Array, Runner, config_of, graph_inputs, made_by_model
from pipeload.tasks.text.batches import by_rows, in_windows
from pipeload.tasks.text.padding import in_batches
from pipeload.tasks.text.pairs import Pair, TextOrPair, is_pair, text_or_pair
from pipeload.tasks.text.tokenizer import tokenizer_of

__all__ = ["BATCH_SIZE", "TOP_K", "classify"]

BATCH_SIZE = 32
"""The most texts or images in one pass, unless the caller sets another number."""

TOP_K = 5
"""The number of labels for each text or image, unless the caller sets another."""

Input = TypeVar("Input", bound="Image | Pair")


@overload
def classify(
    self: Runner,
    inputs: list[Input],
    *,
    top_k: int | None = ...,
    batch_size: int = ...,
    aggregation_strategy: Aggregation = ...,
) -> list[list[Label]]: ...
@overload
def classify(
    self: Runner,
    inputs: Image | Pair,
    *,
    top_k: int | None = ...,
    batch_size: int = ...,
    aggregation_strategy: Aggregation = ...,
) -> list[Label]: ...
def classify(
    self: Runner,
    inputs: Image | Pair | list[Input],
    *,
    top_k: int | None = TOP_K,
    batch_size: int = BATCH_SIZE,
    aggregation_strategy: Aggregation = "simple",
) -> list[Label] | list[list[Label]]:
    """The labels of each text, pair of texts or image, best first; for one input a list, for several a list of lists.

    A token classifier returns the `Entity`s of a text in their order, instead of the best labels. Texts longer than the
    model accepts are cut, with a TruncationWarning.

    Args:
        self: a model exported for text-classification, token-classification or image-classification.
        inputs: texts; or pairs for a model of two texts (paraphrases, entailment): `(text, text_pair)`, or
            `{"text": ..., "text_pair": ...}`; or images: a path, the bytes of a file, a Pillow image, or uint8
            `[height, width, 3]`. Several inputs are a list; a tuple of two texts is one pair.
        top_k: the most labels for each input, None for all. A token classifier ignores it.
        batch_size: the most inputs in one pass; a pass takes fewer if the memory budget cannot hold this many.
        aggregation_strategy: how a token classifier's tokens become entities, as in transformers: "none" (each token is
            one, its label with the prefix of the tag), "simple" (neighbouring tokens of one tag), or words of one tag,
            where a word has the label of its "first" token, of the "average" of its tokens, or of the one with the
            largest score ("max"). Other models ignore it.

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
    if aggregation_strategy not in get_args(Aggregation):
        raise ConfigError(
            f"aggregation_strategy is {aggregation_strategy!r}; choose one of {', '.join(get_args(Aggregation))}."
        )
    task = self.manifest.task
    if task not in ("text-classification", "token-classification", "image-classification"):
        raise ConfigError(
            f"classify takes a model for text-, token- or image-classification; this one is for {task}. "
            "Export it with --task, or use model.run."
        )
    if task == "image-classification":
        several = isinstance(inputs, list | tuple)
        images: Any = inputs if several else [inputs]
        results = _images(self, images, top_k, batch_size)
    else:
        several = not (isinstance(inputs, str) or is_pair(inputs))
        if several:
            check_several(inputs)  # type: ignore[arg-type]
        texts = [text_or_pair(each) for each in (inputs if several else [inputs])]  # type: ignore[union-attr]
        results = (
            _entities(self, texts, batch_size, aggregation_strategy)
            if task == "token-classification"
            else _labels(self, texts, top_k, batch_size)
        )
    return results if several else results[0]


def _labels(runner: Runner, texts: Sequence[TextOrPair], top_k: int | None, batch_size: int) -> list[list[Label]]:
    config = config_of(runner)
    config.require("id2label", "problem_type")
    rows = text_logits(runner, texts, batch_size)
    return [top_labels(scores(row, config.problem_type), config, top_k) for row in rows]


def _entities(runner: Runner, texts: Sequence[Any], batch_size: int, strategy: Aggregation) -> list[list[Label]]:
    for text in texts:
        if isinstance(text, tuple):
            raise ConfigError("A token classifier takes single texts, not pairs. Pass the texts in a list.")
    config, tokenizer = config_of(runner), tokenizer_of(runner)

    def found(part: Sequence[str]) -> list[list[Label]]:
        rows = tokenizer.encode_all(part)

        def made(
            indices: Sequence[int], arrays: Mapping[str, Array], outputs: Mapping[str, Array]
        ) -> list[list[Label]]:
            logits = logits_of(outputs)
            with made_by_model("logits", logits):
                return [
                    [*entities(row[mask], part[index], rows[index], tokenizer, config, strategy)]
                    for index, row, mask in zip(indices, logits, arrays["attention_mask"] != 0, strict=True)
                ]

        return by_rows(runner, rows, batch_size, made)

    return in_windows(texts, found)


def _images(runner: Runner, images: Sequence[Image], top_k: int | None, batch_size: int) -> list[list[Label]]:
    config, processor = config_of(runner), image_processor_of(runner)
    config.require("id2label", "problem_type")
    # The pipeline of transformers for images knows no regression.
    kind = None if config.problem_type == "regression" else config.problem_type
    results: dict[int, list[Label]] = {}

    def run(indices: list[int]) -> None:
        pixels = {"pixel_values": processor.batch([images[index] for index in indices])}
        logits = logits_of(runner.run(graph_inputs(runner, pixels)))
        with made_by_model("logits", logits):
            for index, row in zip(indices, scores(logits, kind), strict=True):
                results[index] = top_labels(row, config, top_k)

    in_batches([0] * len(images), batch_size, run, alone=runner.manifest.quantised_dynamically)
    return [results[index] for index in range(len(images))]
