"""What the commands print: names and texts of strangers are shown on a terminal, and never obeyed by it."""

from __future__ import annotations

import sys

import typer

from pipeload.machine.terminal import printable

__all__ = ["say"]


def say(text: object = "", *, nl: bool = True, err: bool = False) -> None:
    """Print a text; what another program or a file gets of it is the text as it is.

    Args:
        text: anything; a name of a model, or a text that it has made.
        nl: end the line.
        err: on stderr.
    """
    stream = sys.stderr if err else sys.stdout
    typer.echo(printable(str(text)) if stream.isatty() else text, nl=nl, err=err)
