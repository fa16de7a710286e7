"""Pages that are made of the code: commands by Typer's own writer, the Python API by mkdocstrings."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from places import ROOT

import pipeload
import pipeload_export

__all__ = ["commands", "decisions", "python_api"]

_FIRST = ("load", "Model")


def commands() -> str:
    """All commands with their options, as their code declares them."""
    command = [sys.executable, "-m", "typer", "pipeload.cli", "utils", "docs", "--name", "pipeload"]
    # A terminal's width would break lines.
    environment = os.environ | {"COLUMNS": "1000"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    text = done.stdout.replace("# `pipeload`", "# Commands", 1)
    # What follows is a block of code for a terminal, but a paragraph for Markdown.
    return re.sub(r"^Examples:\n", "Examples:\n\n", text, flags=re.MULTILINE)


def python_api() -> str:
    """All public names of both packages."""
    names = [*_FIRST, *sorted(set(pipeload.__all__) - set(_FIRST), key=_errors_last)]
    lines = ["# Python API", "", "## pipeload", ""]
    lines += [f"::: pipeload.{name}\n" for name in names]
    lines += ["## pipeload_export", ""]
    lines += [f"::: pipeload_export.{name}\n" for name in pipeload_export.__all__]
    return "\n".join(lines)


def decisions() -> str:
    """A list of all ADRs."""
    lines = ["# Decisions", "", "Choices that are hard to take back, one page each.", ""]
    for path in sorted((ROOT / "docs" / "adr").glob("0*.md")):
        title = path.read_text("utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"


def _errors_last(name: str) -> tuple[bool, str]:
    return name.endswith(("Error", "Warning")), name
