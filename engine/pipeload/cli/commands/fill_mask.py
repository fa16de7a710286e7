"""`pipeload fill-mask`: the likeliest tokens in the place of a mask."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeload.cli.options import Budget, Directory, Json, Stats, Trace, chunks, open_model
from pipeload.cli.report import print_json
from pipeload.cli.terminal import say
from pipeload.cli.texts import argued_texts, refuse_images
from pipeload.tasks.fill.fill_mask import FilledMask

__all__ = ["fill_mask"]

_CHUNK = 32
"""The number of texts per step of the progress bar."""


def fill_mask(
    directory: Directory,
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT...", help="Texts with the model's mask token; - reads lines from stdin."),
    ],
    top_k: Annotated[int, typer.Option(min=1, help="Tokens for each mask.")] = 5,
    budget: Budget = "auto",
    as_json: Json = False,
    stats: Stats = False,
    trace: Trace = None,
) -> None:
    """Fill the masks of texts with the likeliest tokens, by a model for fill-mask.

    Prints below each text the probability and the words of each token. Masks of one text are filled one by one.

    Examples:
        pipeload fill-mask models/bert-base "Paris is the capital of [MASK]." --budget 256MB

        pipeload fill-mask models/roberta "The <mask> barked." --top-k 1 --json
    """
    wanted = argued_texts(texts, None, "TEXT")
    refuse_images(texts, "fill-mask")
    results: list[Any] = []
    with open_model(directory, budget, stats=stats, trace=trace) as model:
        for chunk in chunks(wanted, _CHUNK, "Filling"):
            results += model.fill_mask(list(chunk), top_k=top_k)
    if as_json:
        print_json([{"text": text, "filled": filled} for text, filled in zip(wanted, results, strict=True)])
        return
    for text, filled in zip(wanted, results, strict=True):
        say(text)
        for number, mask in enumerate(_masks(filled)):
            if number:
                say()
            for each in mask:
                say(f"  {each.score:.4f}  {each.token_str}  {each.sequence}")


def _masks(filled: list[Any]) -> list[list[FilledMask]]:
    """One list for each mask: a text with a single one has no list around it."""
    return filled if isinstance(filled[0], list) else [filled]
