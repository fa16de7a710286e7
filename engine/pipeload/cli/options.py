"""What the commands that run a model have in common: their options, and what these do."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import track

import pipeload
from pipeload.memory import format_bytes

__all__ = [
    "Budget",
    "Directory",
    "Json",
    "Stats",
    "chunks",
    "in_folder",
    "open_model",
    "pairs",
    "read_lines",
    "read_sizes",
    "status",
]

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="A sharded model directory, as `pipeload export` makes it.")
]
Budget = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="The most memory that this process may use, such as 256MB or 1.5GiB; auto takes what is free.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Stats = Annotated[bool, typer.Option("--stats", help="Say on stderr how many passes, seconds and bytes it took.")]

Item = TypeVar("Item")


def in_folder(path: Path | None) -> Path | None:
    """The path of a file to write, whose folder must be there: better said before the work than after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{path} cannot be written: name a file in a folder that exists.")
    return path


@contextmanager
def open_model(directory: Path, budget: str, *, stats: bool, **options: Any) -> Iterator[pipeload.Model]:
    """The loaded model; at the end the line of `--stats`, if it is wanted."""
    begin = time.perf_counter()
    with pipeload.load(directory, budget, **options) as model:
        yield model
        if stats:
            done = model.stats
            typer.echo(
                f"{done.passes} {'pass' if done.passes == 1 else 'passes'} in {time.perf_counter() - begin:.2f} s, "
                f"peak {format_bytes(done.peak_bytes)} of {format_bytes(model.plan.budget_bytes)}",
                err=True,
            )


def status(text: str) -> AbstractContextManager[object]:
    """A sign of life on stderr while something runs; nothing where stderr is no terminal."""
    return Console(stderr=True).status(text)


def chunks(items: Sequence[Item], size: int, text: str) -> Iterator[Sequence[Item]]:
    """The items in groups of `size`, with a progress bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    begins = range(0, len(items), size)
    for begin in track(begins, text, console=console, transient=True, disable=not console.is_terminal):
        yield items[begin : begin + size]


def read_lines(path: Path = Path("-")) -> list[str]:
    """The lines of a file, or of stdin for `-`, without empty ones.

    Raises:
        typer.BadParameter: it cannot be read, or is no UTF-8.
    """
    try:
        text = (sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()).decode()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}.") from error
    return [line for line in text.splitlines() if line.strip()]


def pairs(values: list[str] | None, option: str) -> dict[str, str]:
    """The values of an option that is written as NAME=VALUE, once for each name."""
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
