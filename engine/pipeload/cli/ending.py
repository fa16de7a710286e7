"""How the command line ends: wrong usage, Ctrl-C and warnings are one line on stderr each, as errors are."""

from __future__ import annotations

import sys
import warnings
from typing import Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from pipeload.cli.loudness import WARNINGS
from pipeload.machine.terminal import printable

__all__ = ["INTERRUPTED", "Commands", "print_error"]

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""The base class of wrong usage, whose place in typer depends on the version."""


class Commands(TyperGroup):
    """The commands, without the boxes that typer draws around wrong usage."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the commands as typer does, but end every failure with one line on stderr."""
        alone = options.get("standalone_mode", True)
        options["standalone_mode"] = False
        if not alone:
            return super().main(*args, **options)
        try:
            with warnings.catch_warnings():
                for kind in WARNINGS:
                    warnings.simplefilter("default", kind)
                warnings.showwarning = _show_warning
                code = super().main(*args, **options)
        except _UsageError as error:
            _end_wrong_usage(error)
        except typer.Abort:
            code = 1
        if code == INTERRUPTED:
            print_error("interrupted.")
        sys.exit(code)


def print_error(text: object) -> None:
    """Print one line on stderr."""
    print(printable(f"error: {' '.join(str(text).split())}"), file=sys.stderr)


def _end_wrong_usage(error: Any) -> NoReturn:
    # Typer's message names the invalid value, and its option if known; a message of our own is complete by itself.
    whole = type(error) is typer.BadParameter and error.param is None
    # Without a message, the user gave no command, and typer has printed the help.
    if message := error.message if whole else error.format_message():
        print_error(f"{message.rstrip('.')}.")
        if error.ctx is not None and not whole:
            print(f"Try '{error.ctx.command_path} --help'.", file=sys.stderr)
    sys.exit(error.exit_code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    ours = issubclass(category, WARNINGS)
    text = f"warning: {message}" if ours else warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    print(printable(text), file=file or sys.stderr)
