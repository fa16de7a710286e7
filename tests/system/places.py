"""Folders that cannot be written or executed in, no home, and a clock that jumps."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.preload import Control, no_compiler
from tests.system.processes import Worker
from tests.system.rows import Finding, Row, judge, tiny
from tests.system.space import lacks_mount, mounted

__all__ = ["ROWS"]


@contextmanager
def _read_only(place: Path, options: str) -> Iterator[Path]:
    """A file system with a model on it, which is then mounted with these options."""
    with mounted(place, 64 << 20) as disk:
        shutil.copytree(tiny("bert"), disk / "bert")
        for name in ("cache", "home", "tmp"):
            (disk / name).mkdir()
        subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True, capture_output=True)
        yield disk


def _folders(place: Path) -> Finding:
    """Each of the folders that a process knows, and all of them, read-only, or without the right to execute."""
    found = Finding()
    with Worker() as worker:
        worker.ask("load", directory=str(tiny("bert")), budget="2GB")
        expected = worker.ask("call", task="run").result
    for options in ("ro", "noexec", "ro,noexec"):
        with _read_only(place / "disk", options) as disk:
            changes: dict[str, dict[str, str | None]] = {
                "model": {},
                "cache": {"PIPELOAD_CACHE": str(disk / "cache")},
                "home": {"HOME": str(disk / "home"), "PIPELOAD_CACHE": None, "XDG_CACHE_HOME": None},
                "tmp": {"TMPDIR": str(disk / "tmp")},
                "all": {
                    "HOME": str(disk / "home"),
                    "PIPELOAD_CACHE": None,
                    "XDG_CACHE_HOME": None,
                    "TMPDIR": str(disk / "tmp"),
                },
                "no home": {"HOME": None, "PIPELOAD_CACHE": None, "XDG_CACHE_HOME": None},
                "a home that is missing": {
                    "HOME": str(place / "missing" / "home"),
                    "PIPELOAD_CACHE": None,
                    "XDG_CACHE_HOME": None,
                },
            }
            for name, changed in changes.items():
                found.runs += 1
                words = f"{name}, {options}"
                with Worker({"PIPELOAD_CACHE": str(place / "cache")} | changed) as worker:
                    told = worker.ask("load", directory=str(disk / "bert"), budget="2GB")
                    found.expect(not told.error, f"{words}: {told.error}")
                    if not told.error:
                        right = judge(found, worker.ask("call", task="run"), expected, words)
                        found.expect(right, f"{words}: no answer")
                    ended = worker.end()
                    found.expect(ended.code == 0 and not ended.stderr, f"{words}: {ended.code} {ended.stderr[-300:]}")
    return found


def _clock(place: Path) -> Finding:
    """The clock of the day jumps at each look; a file that is damaged under it is noticed all the same."""
    found = Finding()
    directory = place / "model"
    shutil.copytree(tiny("bert"), directory)
    manifest = (directory / "pipeload.json").read_bytes()
    weights = sorted((directory / "shards").glob("block*.safetensors"))[0]
    with Control(directory, place) as control:
        for jump_s in (0, 1, 2, 5, 3600, 1e6, -3600):
            found.runs += 1
            words = f"a clock that jumps by {jump_s} s"
            (directory / "pipeload.json").write_bytes(manifest)
            control.jump(jump_s)
            with Worker({**control.environment, "PIPELOAD_CACHE": str(place / "cache")}) as worker:
                refused = worker.ask("load", directory=str(directory), budget=1)
                budget = refused.needed_bytes + 1_500_000
                worker.ask("load", directory=str(directory), budget=budget)
                expected = worker.ask("call", task="run").result
                found.expect(judge(found, worker.ask("call", task="run"), expected, words), f"{words}: no answer")
                good = weights.read_bytes()
                # Written over in place: the same inode, size, and time of the last change of content.
                times = weights.stat()
                with weights.open("r+b") as file:
                    file.seek(len(good) - 5)
                    file.write(bytes([good[-5] ^ 1]))
                os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
                errors = [worker.ask("call", task="run") for _ in range(2)]
                worker.ask("close")
                budget = worker.ask("load", directory=str(directory), budget=1).needed_bytes + 1_500_000
                errors.append(worker.ask("load", directory=str(directory), budget=budget))
                if not errors[-1].error:
                    errors[-1] = worker.ask("call", task="run")
                for told in errors:
                    judge(found, told, expected, f"{words}, damaged")
                found.expect(errors[-1].error, f"{words}: the damage is not noticed")
                with weights.open("r+b") as file:
                    file.write(good)
                after = judge(found, worker.ask("call", task="run"), expected, f"{words}, mended")
                found.expect(after, f"{words}: no answer when the file is mended")
                ended = worker.end()
                found.expect(ended.code == 0 and not ended.stderr, f"{words}: {ended.code} {ended.stderr[-300:]}")
    return found


ROWS = (
    Row(
        name="folders",
        fault="model directory, cache, home, TMPDIR read-only or noexec; no home at all",
        outcome="the model loads, and answers right",
        recovered="the same",
        make=_folders,
        lacks=lacks_mount,
        long=True,
    ),
    Row(
        name="clock",
        fault="the clock of the day jumps back and forth, from 1 s to days; then a weight changes",
        outcome="right answers; the changed file is named",
        recovered="right answers when the file is mended",
        make=_clock,
        lacks=no_compiler,
        slow=True,
    ),
)
