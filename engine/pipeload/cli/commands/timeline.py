"""`pipeload timeline`: a trace -> a picture of every agent's work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pipeload.cli.options import in_folder
from pipeload.cli.terminal import say
from pipeload.tracing import chrome
from pipeload.tracing.timeline import SUFFIXES, draw, save

__all__ = ["timeline"]

_LAST = 2


def timeline(
    trace: Annotated[Path, typer.Argument(metavar="TRACE.json", help="What --trace wrote.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            callback=in_folder,
            help="A .png or .svg; else the trace's name with .png.",
        ),
    ] = None,
    passes: Annotated[
        str | None, typer.Option(metavar="A-B", help="Draw these passes, such as 1-2 or 7; else the last ones.")
    ] = None,
    last: Annotated[int | None, typer.Option(metavar="N", min=1, help=f"Draw the last N passes; else {_LAST}.")] = None,
) -> None:
    r"""Draw a trace: one lane for each agent, memory and buffers below.

    Needs the extra \[plot].

    Examples:
        pipeload timeline trace.json

        pipeload timeline trace.json -o first.svg --passes 1-2
    """
    if passes is not None and last is not None:
        raise typer.BadParameter("Say either --passes or --last, not both.")
    target = output or in_folder(trace.with_suffix(".png"))
    assert target is not None
    if target.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(f"{target} ends with none of {', '.join(SUFFIXES)}: name the picture so.")
    numbers = _numbers(passes) if passes is not None else None
    read = chrome.read(trace)
    found = chrome.passes(read.spans)
    shown = chrome.choose(found, *numbers) if numbers else found[-(last or _LAST) :]
    save(draw(read, shown), target)
    say(target)


def _numbers(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise typer.BadParameter(f"Write --passes as A-B, such as 1-2, or as one number, not '{text}'.")
    return int(match[1]), int(match[2] or match[1])
