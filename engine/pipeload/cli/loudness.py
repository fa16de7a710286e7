"""How much the command line says beside its results: `-q` and `-v`, which stand before the command."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Annotated

import typer

from pipeload.cli.terminal import say
from pipeload.errors import EmbeddingWarning, QuantisationWarning, TruncationWarning

__all__ = ["LOUDNESS", "WARNINGS", "Quiet", "Verbose", "show_libraries"]

WARNINGS = (EmbeddingWarning, QuantisationWarning, TruncationWarning)
"""Those of pipeload: one line on stderr, unless the user wants quiet."""

Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Errors only: no progress bars, notes and warnings.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say what passes took, as --stats, and show what libraries print.")
]


@dataclass(slots=True)
class Loudness:
    """The setting of this process.

    Attributes:
        quiet: nothing but results and errors.
        verbose: figures as well.
    """

    quiet: bool = False
    verbose: bool = False

    def set(self, *, quiet: bool, verbose: bool) -> None:
        """Take the user's wishes. Raises typer.BadParameter if they contradict each other."""
        if quiet and verbose:
            raise typer.BadParameter("--quiet and --verbose are both given. Leave one of them out.")
        self.quiet, self.verbose = quiet, verbose
        if quiet:
            for kind in WARNINGS:
                warnings.simplefilter("ignore", kind)
        if verbose:
            show_libraries()

    def note(self, text: str = "") -> None:
        """Print a line on stderr, unless the user wants quiet."""
        if not self.quiet:
            say(text, err=True)


LOUDNESS = Loudness()


def show_libraries() -> None:
    """Let the export show what the libraries in its child processes print."""
    logging.basicConfig()
    logging.getLogger("pipeload_export").setLevel(logging.DEBUG)
