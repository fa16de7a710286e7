"""`pipeload classify`: labels of texts and images, entities in texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer

from pipeload.cli.options import Budget, Directory, Json, JsonLines, Stats, Trace, chunks, open_model
from pipeload.cli.report import print_json
from pipeload.cli.terminal import say
from pipeload.cli.texts import argued_texts, refuse_images
from pipeload.tasks.classify.entities import Aggregation, Entity
from pipeload.tasks.classify.labels import Label

__all__ = ["CHUNK", "classify", "print_labels"]

CHUNK = 32
"""The number of inputs per step of the progress bar."""


def classify(
    directory: Directory,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="(TEXT|IMAGE)...", help="Texts or image files; - reads lines or an image from stdin."),
    ],
    pair: Annotated[
        str | None,
        typer.Option(
            "--pair", metavar="TEXT", help="The second text beside each input, for models of two texts (NLI)."
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels for each input.")] = 5,
    aggregation: Annotated[
        Aggregation,
        typer.Option(
            metavar="HOW",
            help="How tokens become entities, as in transformers: none, simple, first, average or max.",
        ),
    ] = "simple",
    budget: Budget = "auto",
    as_json: Json = False,
    json_lines: JsonLines = False,
    stats: Stats = False,
    trace: Trace = None,
) -> None:
    """Label texts or images, or find the entities in texts, by what the model was made for.

    Examples:
        pipeload classify models/exported/vit cat.jpg dog.jpg --top-k 3 --budget 256MB

        pipeload classify models/sentiment "what a fine day"

        pipeload classify models/nli "It rains." --pair "The street is wet."

        pipeload classify models/ner - --aggregation first < letters.txt
    """
    with open_model(directory, budget, stats=stats, trace=trace) as model:
        images = model.manifest.task == "image-classification"
        if images and pair is not None:
            raise typer.BadParameter("--pair is a second text, and this model takes images.")
        if not images:
            refuse_images(inputs, f"this model for {model.manifest.task}")
        wanted = _read(inputs, images=images)
        results: list[list[Label]] = []
        for chunk in chunks(wanted, CHUNK, "Classifying"):
            values = [value if pair is None else (str(value), pair) for _, value in chunk]
            found = model.classify(values, top_k=top_k, aggregation_strategy=aggregation)
            results.extend(found)
            if json_lines:
                for (name, _), labels in zip(chunk, found, strict=True):
                    say(msgspec.json.encode({"input": name, "labels": labels}).decode())
    names = [name for name, _ in wanted]
    if json_lines:
        return
    print_labels(names, results, as_json=as_json)


def print_labels(names: Sequence[str], results: Sequence[Sequence[Label]], *, as_json: bool) -> None:
    """Print the labels of each input below its name."""
    if as_json:
        print_json([{"input": name, "labels": labels} for name, labels in zip(names, results, strict=True)])
        return
    for name, labels in zip(names, results, strict=True):
        say(name)
        for label in labels:
            where = f"  {label.word}  {label.start}-{label.end}" if isinstance(label, Entity) else ""
            say(f"  {label.score:.4f}  {label.label}{where}")


def _read(inputs: list[str], *, images: bool) -> list[tuple[str, str | bytes]]:
    """Pairs of an input's name for the output and its value for the model."""
    if images:
        return [(value, sys.stdin.buffer.read() if value == "-" else value) for value in inputs]
    return [(text, text) for text in argued_texts(inputs, None, "TEXT")]
