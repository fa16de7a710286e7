"""Names and texts of strangers on the user's terminal and command line.

The attacker gives away a model directory, or a file. He wants orders of his on the user's terminal, which can rewrite
what was shown, set its title or type for the user; a file taken for an option; or arrays that are a bomb or a program.
"""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tests.attacks.attack import HELD, SucceededError, attack, in_child, run_module
from tests.attacks.victims import change_manifest, model_directory

_ORDER = "\x1b]0;evil\x07\x1b[2J\x9b2J\r\b\u202egnp.exe"
_ROOT = Path(__file__).resolve().parents[2]
_FORBIDDEN = ("\x1b", "\x07", "\x9b", "\b", "\u202e")


def on_terminal(*arguments: str, cwd: Path) -> str:
    """What a command shows on a terminal."""
    ours, theirs = pty.openpty()
    path = os.pathsep.join(map(str, (_ROOT / "engine", _ROOT / "exporter")))
    with subprocess.Popen(
        [sys.executable, "-m", "pipeload", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "TERM": "xterm"},
        close_fds=True,
    ):
        os.close(theirs)
        pieces = []
        with suppress(OSError):  # the terminal's end
            while piece := os.read(ours, 1 << 16):
                pieces.append(piece)
    os.close(ours)
    return b"".join(pieces).decode(errors="replace")


@attack
def names_in_a_manifest(folder: Path) -> str:
    """Names of source, kind and tensors in a manifest are orders to the terminal, which `inspect` shows."""

    def change(made: Any) -> None:
        made["source"] = made["model_type"] = f"bert{_ORDER}"
        made["outputs"][0]["name"] = made["shards"][-1]["outputs"][0] = f"out{_ORDER}"

    directory = change_manifest(model_directory(folder), change)
    shown = on_terminal("inspect", str(directory), cwd=folder)
    if "bert\\x1b]0;evil" not in shown or any(one in shown for one in _FORBIDDEN):
        raise SucceededError(repr(shown))
    return HELD


@attack
def names_in_errors(folder: Path) -> str:
    """A directory whose name, and a manifest whose fault, are orders to the terminal."""
    directory = model_directory(folder).rename(folder / f"model{_ORDER}")
    change_manifest(directory, lambda made: made["files"][0].update(path=f"../{_ORDER}"))
    shown = on_terminal("inspect", str(directory), cwd=folder)
    if "error:" not in shown or any(one in shown for one in _FORBIDDEN):
        raise SucceededError(repr(shown))
    return f"refused: {' '.join(shown.split())}"


@attack
def names_that_begin_like_options(folder: Path) -> str:
    """A directory is called `--help`: behind `--`, or with its folder, it is a directory like others."""
    model_directory(folder).rename(folder / "--help")
    for arguments in (("inspect", "--", "--help"), ("inspect", "./--help")):
        shown = on_terminal(*arguments, cwd=folder)
        if "inputs" not in shown or "Usage" in shown:
            raise SucceededError(shown)
    return HELD


@attack
def arrays_that_are_bombs_or_programs(folder: Path) -> str:
    """`--input` is an .npz that grows a thousandfold, a pickle, a header of 2^60 values, or nothing."""
    (folder / "ok.npy").write_bytes(_npy("(1, 3)", np.zeros(3, np.int64).tobytes()))
    with zipfile.ZipFile(folder / "bomb.npy", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("ids.npy", bytes(64 << 20))
    (folder / "pickle.npy").write_bytes(b"\x80\x04cos\nsystem\n(S'touch evil'\ntR.")
    (folder / "object.npy").write_bytes(_npy("(1,)", b"\x80\x04cos\nsystem\n(S'touch evil'\ntR.", "|O"))
    (folder / "huge.npy").write_bytes(_npy("(1152921504606846976,)"))
    (folder / "negative.npy").write_bytes(_npy("(-1, 3)"))
    (folder / "code.npy").write_bytes(_npy("__import__('os').system('touch evil')"))
    (folder / "empty.npy").write_bytes(b"")
    code = """
import sys, os
from pathlib import Path
os.chdir(sys.argv[1])
import typer
from pipeload.cli.commands.run import _read_array
assert _read_array("x", "ok.npy").shape == (1, 3)
for name in sorted(Path().glob("*.npy")):
    try:
        _read_array("x", str(name))
        print("took", name)
    except typer.BadParameter as error:
        print(error)
"""
    told = in_child(code, folder)
    if told.count("took") != 1 or (folder / "evil").exists():
        raise SucceededError(told)
    return f"refused: {told.splitlines()[0]}"


def _npy(shape: str, data: bytes = b"", dtype: str = "<i8") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    made = io.BytesIO()
    made.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
    return made.getvalue()


if __name__ == "__main__":
    run_module(Path(__file__).stem)
