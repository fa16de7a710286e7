"""`.ci/install` refuses an interpreter that cannot work in one line, before it makes anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

_INSTALL = Path(__file__).parents[2] / ".ci" / "install"
_TOO_OLD = """\
case "$2" in
    *"< (3, 11)"*) exit 1 ;;
    *) echo 3.9 ;;
esac
"""
_WITHOUT_VENV = """\
case "$2" in
    *ensurepip*) exit 1 ;;
    *"< (3, 11)"*) exit 0 ;;
    *) echo 3.12 ;;
esac
"""


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (None, "There is no {python} here: install Python 3.11 or later."),
        (
            "exit 127",
            "{python} is a command that does not run: install Python 3.11 or later, or choose it (pyenv shell).",
        ),
        (_TOO_OLD, "{python} is Python 3.9, and pipeload needs 3.11 or later: install that."),
        (_WITHOUT_VENV, "{python} has no venv module: install it (Debian, Ubuntu: apt install python3.12-venv)."),
    ],
    ids=["missing", "not current", "too old", "without venv"],
)
def test_an_interpreter_that_cannot_work_is_refused_in_one_line(
    tmp_path: Path, program: str | None, words: str
) -> None:
    python = tmp_path / "python3"
    if program:
        python.write_text(f"#!/bin/sh\n{program}")
        python.chmod(0o755)
    done = subprocess.run(
        [_INSTALL, python, tmp_path / "venv", "full"], capture_output=True, text=True, timeout=60, check=False
    )
    remedy = "Or name another interpreter, as in: make test PYTHON=python3.12"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{words.format(python=python)} {remedy}\n"
    assert not (tmp_path / "venv").exists()
