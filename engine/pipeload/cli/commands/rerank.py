"""`pipeload rerank`: documents in the order in which they answer a query."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeload.cli.options import Budget, Directory, Json, Stats, Trace, open_model
from pipeload.cli.report import print_json
from pipeload.cli.terminal import say
from pipeload.cli.texts import argued_texts, refuse_images

__all__ = ["rerank"]


def rerank(
    directory: Directory,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What is asked.")],
    documents: Annotated[
        list[str] | None, typer.Argument(metavar="DOCUMENT...", help="The documents; - reads lines from stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with one document a line.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="The most documents to print; all if not given.")] = None,
    budget: Budget = "auto",
    as_json: Json = False,
    stats: Stats = False,
    trace: Trace = None,
) -> None:
    """Order documents by how well they answer a query, best first, by a cross-encoder.

    Prints each document's score, its place in the input, and its text.

    Examples:
        pipeload rerank models/reranker "How many people live in Berlin?" "Berlin has 3.5 million people." "A cat."

        pipeload rerank models/reranker "how to cook rice" --file documents.txt --top-k 3 --budget 256MB
    """
    wanted = argued_texts(documents, file, "DOCUMENT")
    refuse_images(documents or [], "rerank")
    with open_model(directory, budget, stats=stats, trace=trace) as model:
        found = model.rerank(query, wanted, top_k=top_k)
    if as_json:
        print_json(found)
        return
    for ranked in found:
        say(f"{ranked.score:9.4f}  {ranked.index}  {ranked.text}")
