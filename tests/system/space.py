"""Disks without room, for what is written: exports, conversions, and the findings in the user's cache."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.kills import _convert, _export, _lacks_onnx, content
from tests.system.processes import Worker, run_command
from tests.system.rows import Finding, Row, judge, lacks_real, one_error, tiny

__all__ = ["ROWS", "mounted"]


@contextmanager
def mounted(place: Path, nbytes: int, options: str = "") -> Iterator[Path]:
    """A small file system in memory, until the context ends."""
    place.mkdir(parents=True, exist_ok=True)
    given = f"size={nbytes}{options}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", given, "pipeload-test", str(place)], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def lacks_mount() -> str | None:
    """Why no file system can be mounted here."""
    return None if os.geteuid() == 0 and hasattr(os, "mkfifo") else "needs the right to mount a file system"


def _file_limit(nbytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def _grows(command: Callable[[Path, Path], tuple[object, ...]]) -> Callable[[Path], Finding]:
    """Files may have so many bytes and no more (EFBIG in the middle of a write), from hardly any to enough."""

    def make(place: Path) -> Finding:
        found, target = Finding(), place / "out" / "target"
        target.parent.mkdir()
        arguments = [*command(place, target), "--force"]
        one_error(found, run_command(*arguments), "undisturbed")
        right = content(target)
        largest = max(path.stat().st_size for path in target.rglob("*") if path.is_file())
        for share in (0.0, 0.02, 0.1, 0.5, 0.9, 0.999, 1.5):
            found.runs += 1
            words = f"files of {int(largest * share)} bytes"
            good = one_error(found, run_command(*arguments, before=_file_limit(int(largest * share))), words)
            found.expect(good or share < 1.0, f"{words}: it fails")
            found.expect(target.exists() and content(target) == right, f"{words}: the old target is touched")
            names = sorted(path.name for path in target.parent.iterdir())
            found.expect(names == ["target"], f"{words}: it leaves {names}")
        return found

    return make


def _small_disk(place: Path) -> Finding:
    """The disk has less room than the export takes, by any part of it."""
    found = Finding()
    arguments = list(_export(place, place / "whole"))
    one_error(found, run_command(*arguments), "undisturbed")
    right = content(place / "whole")
    taken = sum(path.stat().st_size for path in (place / "whole").rglob("*"))
    for share in (0.05, 0.3, 0.6, 0.9, 1.1, 1.5, 2.0, 4.0):
        found.runs += 1
        words = f"{share} of what the model takes"
        with mounted(place / "disk", int(taken * share)) as disk:
            if one_error(found, run_command(arguments[0], arguments[1], disk / "target"), words):
                found.expect(content(disk / "target") == right, f"{words}: another result")
            else:
                names = [path.name for path in disk.iterdir()]
                found.expect(not names, f"{words}: it leaves {names}")
        found.expect(share < 4 or not found.failures, f"{words}: it fails")
    return found


def _cache(place: Path) -> Finding:
    """The cache of profiles and stamps lies on a full disk, or cannot grow, or is a file."""
    found = Finding()
    directory = str(tiny("bert"))
    expected: list[float] = []
    (place / "file").write_text("x")

    def use(cache: Path, words: str) -> None:
        nonlocal expected
        found.runs += 1
        with Worker({"PIPELOAD_CACHE": str(cache)}) as worker:
            told = worker.ask("load", directory=directory, budget="2GB")
            found.expect(not told.error, f"{words}: load fails: {told.error}")
            if not told.error:
                told = worker.ask("call", task="run")
                expected = expected or told.result
                found.expect(judge(found, told, expected, words), f"{words}: {told.error}")
            ended = worker.end()
            found.expect(ended.code == 0 and not ended.stderr, f"{words}: the end: {ended.code} {ended.stderr[-300:]}")

    use(place / "cache", "a good cache")
    use(place / "file", "a file in the place of the cache")
    use(place / "file" / "deeper", "a cache below a file")
    if not lacks_mount():
        for nbytes, options in ((4096, ""), (8192, ""), (16384, ""), (65536, ",nr_inodes=2"), (65536, ",nr_inodes=4")):
            with mounted(place / "full", nbytes, options) as full:
                use(full, f"a cache on a disk of {nbytes} bytes{options}")
                left = [path.name for path in full.rglob(".staging-*")]
                found.expect(not left, f"a cache on a disk of {nbytes} bytes: it leaves {left}")
    return found


ROWS = (
    Row(
        name="full-export",
        fault="a write of an export fails (EFBIG), its target exists",
        outcome="one error; the old target is untouched, nothing is left beside it",
        recovered="the next export succeeds",
        make=_grows(_export),  # type: ignore[arg-type]
        lacks=_lacks_onnx,
        long=True,
    ),
    Row(
        name="full-convert",
        fault="a write of a conversion fails (EFBIG), its target exists",
        outcome="one error; the old target is untouched, nothing is left beside it",
        recovered="the next conversion succeeds",
        make=_grows(_convert),  # type: ignore[arg-type]
        lacks=lambda: _lacks_onnx() or lacks_real("minilm")(),
        long=True,
    ),
    Row(
        name="full-disk",
        fault="a disk is full before an export ends",
        outcome="one error; nothing is left on it",
        recovered="a larger disk works",
        make=_small_disk,
        lacks=lambda: lacks_mount() or _lacks_onnx(),
        long=True,
    ),
    Row(
        name="full-cache",
        fault="the user's cache cannot be written: full, without inodes, a file",
        outcome="the model loads, and answers right",
        recovered="the same",
        make=_cache,
        long=True,
    ),
)
