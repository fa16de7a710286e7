"""`pipeload answer`: the stretch of a text that answers a question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeload.cli.options import Budget, Directory, Json, Stats, Trace, open_model
from pipeload.cli.report import print_json
from pipeload.cli.terminal import say
from pipeload.cli.texts import read_text

__all__ = ["answer"]


def answer(
    directory: Directory,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What is asked.")],
    context: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The text that holds the answer; - reads it from stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with the text.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="The most answers, best first.")] = 1,
    impossible: Annotated[
        bool, typer.Option("--impossible", help="The text may have no answer; an empty one says so.")
    ] = False,
    budget: Budget = "auto",
    as_json: Json = False,
    stats: Stats = False,
    trace: Trace = None,
) -> None:
    """Find the stretch of a text that answers a question, by a model for question-answering.

    Prints each answer's score, its words, and its first character and the one past its last in the text.

    Examples:
        pipeload answer models/squad "Where does Anna live?" "Anna and Bob live in Paris." --budget 256MB

        pipeload answer models/squad "What does the warranty cover?" --file manual.txt --top-k 3
    """
    if (context is None) == (file is None):
        raise typer.BadParameter("Give the TEXT that holds the answer, - for stdin, or --file: one of them.")
    source = Path("-") if context == "-" else file
    text = str(context) if source is None else read_text(source)
    with open_model(directory, budget, stats=stats, trace=trace) as model:
        found = model.answer(question, text, top_k=top_k, handle_impossible_answer=impossible)
    if as_json:
        print_json(found)
        return
    for each in found:
        say(f"{each.score:.4f}  {each.answer}  {each.start}-{each.end}")
