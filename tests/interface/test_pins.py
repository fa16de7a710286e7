"""The interface of users stays as it was: names, signatures, help, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.interface.pins import COMMANDS, PINNED, file_of, help_of, signatures_of, texts, without_frames
from tests.marks import slow

import pipeload
import pipeload_export
from pipeload.cli import app

_HINT = "run `python -m tests.interface.pins` if this change is meant, and note it in CHANGELOG.md"


@pytest.mark.parametrize("package", [pipeload, pipeload_export], ids=lambda package: package.__name__)
def test_public_names_and_signatures_stay(package: object) -> None:
    name = package.__name__  # type: ignore[attr-defined]
    assert signatures_of(package).splitlines() == (PINNED / f"{name}.txt").read_text().splitlines(), _HINT


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_stays(command: str) -> None:
    pinned = (PINNED / file_of(command)).read_text()
    assert without_frames(help_of(command)) == without_frames(pinned), _HINT


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_of_80_columns(command: str) -> None:
    """Names of options were cut, and paragraphs kept the line breaks of the source."""
    text = help_of(command, width=80)
    assert "\u2026" not in text
    paragraphs = text.partition("Examples:")[0].partition("\u256d")[0].split("\n\n")
    for lines in (paragraph.splitlines() for paragraph in paragraphs if "Usage:" not in paragraph):
        for line, following in pairwise(lines):
            first = following.split()[0] if following.split() else ""
            assert len(line.rstrip()) + 1 + len(first) >= 80 - 1, line


def test_every_command_and_package_is_pinned() -> None:
    assert sorted(texts()) == sorted(path.name for path in PINNED.iterdir())
    found = {_name_of(command) for command in app.registered_commands}
    for group in app.registered_groups:
        found |= {group.name, *(f"{group.name} {_name_of(each)}" for each in group.typer_instance.registered_commands)}
    assert found == set(COMMANDS[1:])


def _name_of(command: Any) -> str:
    return str(command.name or command.callback.__name__.replace("_", "-"))


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["--version"], 0),
        slow(["--help"], 0),
        (["inspect", "no such directory"], 1),
        slow(["run", "no such directory", "--random"], 1),
        slow(["run"], 2),
        (["no-such-command"], 2),
        slow([], 2),
    ],
)
def test_exit_codes_stay(arguments: list[str], exit_code: int) -> None:
    """130 for Ctrl-C is tested where the command line ends, in tests/engine/cli/test_cli_ending.py."""
    root = Path(pipeload.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pipeload", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    if exit_code == 1:
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
