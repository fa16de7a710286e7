"""Texts that the commands take: from arguments, files and stdin."""

from __future__ import annotations

import errno
import mimetypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import typer

from pipeload.cli.terminal import say
from pipeload.machine.files import read_stream
from pipeload.machine.sizes import format_bytes

__all__ = ["argued_texts", "is_typed", "read_lines", "read_text", "read_turns", "refuse_images"]


_MOST_BYTES = 256 << 20


def read_text(path: Path = Path("-")) -> str:
    """All of a file, or of stdin for `-`.

    Raises:
        typer.BadParameter: it cannot be read, is not UTF-8, or has only white space.
    """
    name = "stdin" if path == Path("-") else str(path)
    try:
        text = _bytes_of(path).decode()
    except OSError as error:
        raise typer.BadParameter(f"{name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{name} is no UTF-8 text: {error.reason} at byte {error.start}.") from error
    if not text.strip():
        raise typer.BadParameter(f"{name} has no text.")
    return text


def _bytes_of(path: Path) -> bytes:
    if path != Path("-"):
        return read_stream(path, most_bytes=_MOST_BYTES)
    data = sys.stdin.buffer.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise OSError(errno.EFBIG, f"it holds more than the {format_bytes(_MOST_BYTES)} that are read of it")
    return data


def read_lines(path: Path = Path("-")) -> list[str]:
    """The lines of a file, or of stdin for `-`, without empty ones. Raises as `read_text` does."""
    return [line for line in read_text(path).splitlines() if line.strip()]


def argued_texts(texts: Iterable[str] | None, file: Path | None, name: str) -> list[str]:
    """The texts of a command's arguments, with the lines of stdin in the place of each `-`, and those of a file.

    Args:
        texts: the arguments.
        file: its lines follow; None for no file.
        name: what the help calls such an argument.

    Raises:
        typer.BadParameter: there is none; or as `read_text`.
    """
    found = [line for text in texts or [] for line in (read_lines() if text == "-" else [text])]
    found += read_lines(file) if file else []
    if not found:
        raise typer.BadParameter(f"Give at least one {name}, - for stdin, or --file.")
    return found


def is_typed() -> bool:
    """Whether stdin is a terminal, where a user types."""
    return sys.stdin.isatty()


def read_turns() -> Iterator[str]:
    """The user's lines as they come, without empty ones, until the input ends. A terminal shows a prompt.

    Raises:
        typer.BadParameter: a line is not UTF-8.
    """
    lines = _typed() if is_typed() else (line.decode() for line in sys.stdin.buffer)
    try:
        yield from (stripped for line in lines if (stripped := line.strip()))
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"stdin is no UTF-8 text: {error.reason} at byte {error.start} of a line.") from error


def _typed() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and a history
    try:
        while True:
            yield input("> " if sys.stdout.isatty() else "")
    except EOFError:
        say(err=True)


def refuse_images(texts: Iterable[str], taker: str) -> None:
    """Raise typer.BadParameter if one of the texts names an image file: the model would get the name as a text."""
    for text in texts:
        kind = mimetypes.guess_type(text, strict=False)[0] or ""
        # A long text is not a file name, and looking it up would be an error.
        if kind.startswith("image/") and len(text) < 1024 and Path(text).is_file():
            raise typer.BadParameter(
                f"{text} is an image file, and {taker} takes texts. "
                "Use a model for image-classification with `pipeload classify`."
            )
