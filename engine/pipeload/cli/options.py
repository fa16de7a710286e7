"""Shared by the commands that run a model: their options, and the code behind these options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import track

import pipeload
from pipeload.cli.loudness import LOUDNESS
from pipeload.cli.passes import pass_progress, stats_lines
from pipeload.cli.terminal import say
from pipeload.tracing.chrome import write_chrome

__all__ = [
    "Budget",
    "Directory",
    "Json",
    "JsonLines",
    "Stats",
    "Trace",
    "chunks",
    "in_folder",
    "open_model",
    "pairs",
    "read_sizes",
    "status",
]


def in_folder(path: Path | None) -> Path | None:
    """The path of a file to write, whose folder must be there: checked before the work, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{path} cannot be written: name a file in a folder that exists.")
    return path


Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="A sharded model directory, as `pipeload export` makes it.")
]
Budget = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        envvar="PIPELOAD_BUDGET",
        help="The most memory that this process may use, such as 256MB or 1.5GiB; auto takes what is free.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
JsonLines = Annotated[
    bool,
    typer.Option("--jsonl", help="Print JSON Lines: the result of each input as one line, as soon as it is there."),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        callback=in_folder,
        help="Write what every agent did and when, as JSON for Perfetto and `pipeload timeline`.",
    ),
]
Stats = Annotated[
    bool,
    typer.Option(
        "--stats", help="Say on stderr what the passes took, and how near that is to what the machine can do."
    ),
]

Item = TypeVar("Item")

_CONSOLE = Console(stderr=True)
"""One console for all displays: displays on one console stack, displays on several garble each other."""


@contextmanager
def open_model(
    directory: Path, budget: str, *, stats: bool, trace: Path | None, quiet: bool = False, **options: Any
) -> Iterator[pipeload.Model]:
    """The loaded model, with a bar for each long pass; at the end it writes the output of `--stats` and `--trace`.

    Args:
        directory: the sharded model directory.
        budget: as `pipeload.load` takes it.
        stats: print figures on stderr.
        trace: the file for the trace; None writes none.
        quiet: draw no bar, since the command itself writes to the terminal.
        **options: for `pipeload.load`.
    """
    with ExitStack() as stack:
        progress = None if quiet or LOUDNESS.quiet else stack.enter_context(pass_progress(_CONSOLE))
        model = stack.enter_context(pipeload.load(directory, budget, progress=progress, **options))
        yield model
        done, plan = model.stats, model.plan
        if stats or LOUDNESS.verbose:
            for line in stats_lines(done, plan):
                say(line, err=True)
            if model.draft is not None:
                say(str(model.draft), err=True)
        if trace is not None:
            facts = {
                "model": directory.name,
                "budget_bytes": plan.budget_bytes,
                "loaders": plan.loaders,
                "buffers": plan.buffers,
            }
            write_chrome(model.trace, trace, facts)


def status(text: str) -> AbstractContextManager[object]:
    """A sign of life on stderr while something runs; nothing if stderr is not a terminal."""
    return nullcontext() if LOUDNESS.quiet else _CONSOLE.status(text)


def chunks(items: Sequence[Item], size: int, text: str) -> Iterator[Sequence[Item]]:
    """The items in groups of `size`, with a progress bar on stderr if that is a terminal."""
    begins = range(0, len(items), size)
    for begin in track(
        begins, text, console=_CONSOLE, transient=True, disable=LOUDNESS.quiet or not _CONSOLE.is_terminal
    ):
        yield items[begin : begin + size]


def pairs(values: list[str] | None, option: str) -> dict[str, str]:
    """The values of an option that is repeated as NAME=VALUE."""
    split = [value.partition("=") for value in values or []]
    for name, equals, value in split:
        if not (name and equals and value):
            raise typer.BadParameter(f"Write {option} as NAME=VALUE, not '{name}{equals}{value}'.")
    return {name: value for name, _, value in split}


def read_sizes(values: list[str] | None) -> dict[str, int]:
    """The sizes of `--size NAME=N`."""
    sizes = pairs(values, "--size")
    for name, text in sizes.items():
        if not text.isdecimal():
            raise typer.BadParameter(f"The size of {name} must be a number, not '{text}'.")
    return {name: int(text) for name, text in sizes.items()}
