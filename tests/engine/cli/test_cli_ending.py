"""How the command line begins and ends: one line on stderr for whatever stops it, and its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import EMULATED
from typer.testing import CliRunner

import pipeload
from pipeload import __main__ as beginning
from pipeload import cli
from pipeload.cli import app

_BY_ITSELF = pytest.mark.skipif(EMULATED, reason="subprocesses do not work under qemu")

_HANGS_AT_IMPORT = """
import sys

class Gate:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            open(sys.argv[1], "w").close()
            try:
                while True:
                    pass  # a wait would sleep through a signal that comes just before it
            except KeyboardInterrupt:
                raise ImportError("a library that takes everything for a failed import") from None

sys.meta_path.insert(0, Gate())
from pipeload.__main__ import main
main()
"""

_HANGS_AT_WORK = """
import sys
import pipeload
from pipeload.__main__ import main

begun = sys.argv.pop()

def load(*_, **__):
    open(begun, "w").close()
    while True:
        pass

pipeload.load = load
main()
"""


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@_BY_ITSELF
@pytest.mark.parametrize(
    ("program", "arguments"), [(_HANGS_AT_IMPORT, []), (_HANGS_AT_WORK, ["run", "model", "--random"])]
)
def test_an_interrupt_is_one_line(program: str, arguments: list[str], tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, str(begun)],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    begun.read_text()  # waits until the program opens it
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, b"", b"error: interrupted.\n")


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_the_commands_run_with_the_interrupt_handler_that_was_there(
    handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(cli, "main", lambda: found.append(signal.getsignal(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, handler)
    try:
        beginning.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == [handler]


@_BY_ITSELF
def test_the_package_is_a_program() -> None:
    command = [sys.executable, "-m", "pipeload"]
    done = subprocess.run([*command, "--version"], env=_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"pipeload {pipeload.__version__}\n", "")
    done = subprocess.run([*command, "embed"], env=_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Missing argument 'DIR'.\nTry 'pipeload embed --help'.\n"


@_BY_ITSELF
def test_importing_the_package_is_cheap_and_gives_all_of_it() -> None:
    program = (
        "import sys, pipeload\n"
        "assert not {'numpy', 'onnxruntime', 'msgspec', 'typer'} & sys.modules.keys()\n"
        "assert set(pipeload.__all__) <= set(dir(pipeload))\n"
        "from pipeload import *\n"
        "named = set(pipeload.__all__) - set(vars(pipeload.errors))\n"
        "assert {getattr(pipeload, name).__module__ for name in named} == {'pipeload'}\n"
        "assert 'load' in vars(pipeload)\n"
    )
    subprocess.run([sys.executable, "-c", program], env=_environment(), check=True)
    assert not hasattr(pipeload, "no_such_name")


@pytest.mark.parametrize(
    ("arguments", "line", "command"),
    [
        (["embed"], "Missing argument 'DIR'.", "pipeload embed"),
        (["nonsense"], "No such command 'nonsense'.", "pipeload"),
        (
            ["generate", "m", "a", "--max-new-tokens", "0"],
            "Invalid value for '--max-new-tokens': ",
            "pipeload generate",
        ),
        (["run", "m", "--no-such"], "No such option: --no-such", "pipeload run"),
    ],
)
def test_wrong_usage_is_one_line_and_where_to_read_on(arguments: list[str], line: str, command: str) -> None:
    result = CliRunner().invoke(app, arguments, prog_name="pipeload")
    assert (result.exit_code, result.stdout) == (2, "")
    error, hint = result.stderr.splitlines()
    assert error.startswith(f"error: {line}")
    assert error.endswith(".")
    assert hint == f"Try '{command} --help'."


def test_what_a_command_says_about_its_values_is_all() -> None:
    result = CliRunner().invoke(app, ["run", "model", "--size", "a=b"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: The size of a must be a number, not 'b'.\n"


def test_nothing_asked_for_shows_the_commands() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "classify" in result.stdout
    assert result.stderr == ""
