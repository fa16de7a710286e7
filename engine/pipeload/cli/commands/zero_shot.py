"""`pipeload zero-shot`: labels that the caller names, by a model of entailment."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeload.cli.commands.classify import CHUNK, print_labels
from pipeload.cli.options import Budget, Directory, Json, Stats, Trace, chunks, open_model
from pipeload.cli.texts import argued_texts, refuse_images
from pipeload.tasks.classify.labels import Label
from pipeload.tasks.classify.zero_shot import HYPOTHESIS

__all__ = ["zero_shot"]


def zero_shot(
    directory: Directory,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="The texts; - reads lines from stdin.")],
    labels: Annotated[
        str, typer.Option("--labels", metavar="A,B,...", help="The labels to choose from, with commas between them.")
    ],
    template: Annotated[
        str, typer.Option(metavar="TEXT", help="The sentence that a label completes, with {} in its place.")
    ] = HYPOTHESIS,
    multi_label: Annotated[
        bool, typer.Option("--multi-label", help="Each label holds or not, independently of the others.")
    ] = False,
    budget: Budget = "auto",
    as_json: Json = False,
    stats: Stats = False,
    trace: Trace = None,
) -> None:
    """Label texts with labels of your own, by a model of natural language inference (NLI).

    Examples:
        pipeload zero-shot models/nli "My screen is broken" --labels "phone,garden,cooking" --budget 256MB

        pipeload zero-shot models/nli - --labels "urgent,can wait" --multi-label < letters.txt
    """
    wanted = argued_texts(texts, None, "TEXT")
    refuse_images(texts, "zero-shot")
    results: list[list[Label]] = []
    with open_model(directory, budget, stats=stats, trace=trace) as model:
        for chunk in chunks(wanted, CHUNK, "Classifying"):
            results += model.zero_shot(
                list(chunk), labels.split(","), hypothesis_template=template, multi_label=multi_label
            )
    print_labels(wanted, results, as_json=as_json)
