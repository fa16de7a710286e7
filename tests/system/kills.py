"""Exports and conversions that are killed at random moments, each followed by one that is left alone."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from tests.models import REPOSITORY
from tests.system.processes import PATIENCE_S, environment
from tests.system.rows import Finding, Row, lacks_real, real

__all__ = ["ROWS", "content"]


def content(directory: Path) -> dict[str, str]:
    """The sha256 of every file of a directory."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _start(arguments: Sequence[object]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "pipeload", *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _finish(found: Finding, arguments: Sequence[object], words: str) -> float:
    """Let the command end, which must succeed. Returns the seconds that it took."""
    begin_s = time.monotonic()
    process = _start(arguments)
    _, errors = process.communicate(timeout=PATIENCE_S)
    found.expect(process.returncode == 0, f"{words}: {errors.decode()[-300:]}")
    return time.monotonic() - begin_s


def _killed(command: Callable[[Path, Path], Sequence[object]], kills: int, seed: int) -> Callable[[Path], Finding]:
    """Kill the command at random moments; after each third kill let it end, and begin anew."""

    def make(place: Path) -> Finding:
        found, moments = Finding(), random.Random(seed)
        folder, whole = place / "out", place / "whole"
        folder.mkdir()
        target = folder / "target"
        took_s = _finish(found, command(place, whole), "undisturbed")
        right = content(whole)
        for number in range(kills):
            found.runs += 1
            process = _start(command(place, target))
            try:
                process.wait(moments.uniform(0, took_s))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            process.communicate(timeout=PATIENCE_S)
            words = f"kill {number} of seed {seed}"
            if target.exists():
                found.expect(content(target) == right, f"{words}: the target is not whole")
            strange = [
                path.name for path in folder.iterdir() if path != target and not path.name.startswith(".target.")
            ]
            found.expect(not strange, f"{words}: it leaves {strange}")
            if number % 3 == 2 or target.exists():
                if not target.exists():
                    _finish(found, command(place, target), f"after {words}")
                    found.expect(content(target) == right, f"after {words}: another result")
                    names = sorted(path.name for path in folder.iterdir())
                    found.expect(names == ["target"], f"after {words}: it leaves {names}")
                for path in target.rglob("*"):
                    if path.is_file():
                        path.unlink()
                subprocess.run(["rm", "-rf", str(target)], check=True)
        return found

    return make


def _export(place: Path, target: Path) -> Sequence[object]:
    from tests.exporter.models import write_onnx

    source = place / "source" / "model.onnx"
    if not source.exists():
        write_onnx(source, blocks=12)
        (source.parent / "config.json").write_text('{"model_type": "toy", "architectures": ["ToyModel"]}')
    return "export", source, target


def _convert(place: Path, target: Path) -> Sequence[object]:
    return "convert", real("minilm"), target, "--weights", "int8", "--no-verify"


def _lacks_onnx() -> str | None:
    return None if find_spec("onnx") else "needs the extra [export]"


ROWS = (
    Row(
        name="kill-export",
        fault="SIGKILL of an export at a random moment",
        outcome="the target is absent or whole",
        recovered="the next export goes on, makes the same files, and leaves no others",
        make=_killed(_export, 30, 1),
        lacks=_lacks_onnx,
        long=True,
    ),
    Row(
        name="kill-convert",
        fault="SIGKILL of a conversion of MiniLM at a random moment",
        outcome="the target is absent or whole",
        recovered="the next conversion goes on, makes the same files, and leaves no others",
        make=_killed(_convert, 21, 2),
        lacks=lambda: _lacks_onnx() or lacks_real("minilm")(),
        long=True,
    ),
)
