"""`pipeload generate`: continue a text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pipeload.cli.options import Budget, Directory, Json, Stats, Trace, open_model, status
from pipeload.cli.report import print_json
from pipeload.cli.texts import read_text, refuse_images
from pipeload.tasks.generate import MAX_NEW_TOKENS
from pipeload.tasks.generate import generate as generate_text

__all__ = ["generate"]


def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = MAX_NEW_TOKENS,
    budget: Budget = "auto",
    as_json: Json = False,
    stats: Stats = False,
    trace: Trace = None,
) -> None:
    """Continue a text, always with the likeliest next token.

    Prints the text and its continuation as it comes. It ends where the model ends it, or after the tokens asked for.

    Examples:
        pipeload generate models/exported/smollm2-135m "The capital of France is" --max-new-tokens 8 --budget 256MB

        pipeload generate models/exported/smollm2-135m - --json < prompt.txt
    """
    refuse_images([prompt], "generate")
    text = read_text().rstrip("\n") if prompt == "-" else prompt
    with open_model(directory, budget, stats=stats, trace=trace, quiet=True) as model:
        if as_json:
            with status("Generating"):
                made = generate_text(model, text, max_new_tokens=max_new_tokens)
            print_json({"prompt": text, **asdict(made)})
            return
        started = False

        def show(piece: str) -> None:
            # The prompt only now, so that an error leaves nothing on stdout.
            nonlocal started
            typer.echo(piece if started else text + piece, nl=False)
            started = True

        generate_text(model, text, max_new_tokens=max_new_tokens, stream=show)
        typer.echo("" if started else text)
