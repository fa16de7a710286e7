"""Other memory allocators that are preloaded, and huge pages: the budget holds, or the model is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.system.preload import Control, no_compiler
from tests.system.processes import Worker
from tests.system.rows import Finding, Row, judge, lacks_real, real

__all__ = ["ROWS"]

_LIBRARIES = {
    "jemalloc": ("libjemalloc2", "libjemalloc.so.2"),
    "mimalloc": ("libmimalloc2.0", "libmimalloc.so.2.0"),
    "tcmalloc": ("libtcmalloc-minimal4", "libtcmalloc_minimal.so.4"),
}
_WITHOUT = (
    "import ctypes, os, sys\n"
    "assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0\n"  # PR_SET_THP_DISABLE, which execve keeps
    "os.execv(sys.argv[1], sys.argv[1:])"
)
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@cache
def _library(name: str) -> Path | None:
    """The library of the system, or else that of its package, unpacked into a temporary folder."""
    package, file = _LIBRARIES[name]
    for folder in (Path("/usr/lib"), Path("/usr/local/lib")):
        if found := next(folder.rglob(file), None):
            return found
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return None
    place = Path(tempfile.mkdtemp(prefix="pipeload-allocator-"))
    subprocess.run(["apt-get", "download", package], cwd=place, capture_output=True, check=False, timeout=120)
    for archive in place.glob("*.deb"):
        subprocess.run(["dpkg", "-x", archive, place], check=True)
    return next(place.rglob(file), None)


def _lacks(name: str) -> Callable[[], str | None]:
    def lacks() -> str | None:
        if missing := lacks_real("minilm")():
            return missing
        return None if _library(name) else f"{name} is neither installed nor to be had from apt"

    return lacks


def _calls(found: Finding, worker: Worker, model: str, task: str, words: str) -> None:
    """Load under a small budget, call a few times: the budget holds in all of that, or the model is refused."""
    directory = str(real(model))
    refused = worker.ask("load", directory=directory, budget=1)
    if refused.error and refused.error[0] != "BudgetError":
        judge(found, refused, [], words)
        found.runs += 1
        return
    with Worker() as other:
        other.ask("load", directory=directory, budget="2GB")
        expected = other.ask("call", task=task).result
    for more in (2_000_000, 30_000_000):
        budget = worker.ask("load", directory=directory, budget=1).needed_bytes + more
        found.runs += 1
        told = worker.ask("load", directory=directory, budget=budget)
        found.expect(not told.error, f"{words}: {told.error}")
        for _ in range(8 if task == "embed" else 2):
            found.expect(judge(found, worker.ask("call", task=task), expected, words), f"{words}: no answer")
        peak = worker.ask("facts").result["peak"]
        found.expect(peak <= budget, f"{words}: its peak is {peak}, over {budget}")
        worker.ask("close")
    ended = worker.end()
    found.expect(ended.code == 0 and not ended.stderr, f"the end: {ended.code} {ended.stderr[-300:]}")


def _preloaded(name: str) -> Callable[[Path], Finding]:
    def make(place: Path) -> Finding:
        found = Finding()
        for model, task in (("minilm", "embed"),):
            with Worker({"LD_PRELOAD": str(_library(name)), "PIPELOAD_CACHE": str(place / "cache")}) as worker:
                _calls(found, worker, model, task, f"{name}, {model}")
        return found

    return make


def _huge_pages(always: bool) -> Callable[[Path], Finding]:
    """Every mapping and the heap ask for huge pages, or the process may have none."""

    def make(place: Path) -> Finding:
        found = Finding()
        for model, task in (("minilm", "embed"), ("smollm2-135m", "generate")):
            changes: dict[str, str | None] = {"PIPELOAD_CACHE": str(place / model)}
            if always:
                with Control(place, place) as control:
                    control.huge_pages()
                    changes |= {**control.environment, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
                    with Worker(changes) as worker:
                        _calls(found, worker, model, task, f"huge pages, {model}")
            else:
                with Worker(changes, (sys.executable, "-c", _WITHOUT)) as worker:
                    _calls(found, worker, model, task, f"no huge pages, {model}")
        return found

    return make


def _lacks_huge_pages() -> str | None:
    if not _SETTING.exists():
        return "the kernel has no transparent huge pages"
    if "[never]" in _SETTING.read_text():
        return "transparent huge pages are switched off on this machine"
    return no_compiler() or lacks_real("minilm")() or lacks_real("smollm2-135m")()


ROWS = (
    *(
        Row(
            name=name,
            fault=f"{name} is preloaded",
            outcome="LoadError that names it: no budget can be kept",
            recovered="the program without it works",
            make=_preloaded(name),
            lacks=_lacks(name),
            slow=True,
        )
        for name in _LIBRARIES
    ),
    Row(
        name="huge-pages",
        fault="huge pages for every mapping and the heap",
        outcome="peak <= budget, right answers",
        recovered="the same",
        make=_huge_pages(True),
        lacks=_lacks_huge_pages,
        long=True,
    ),
    Row(
        name="no-huge-pages",
        fault="no huge pages for the process (prctl)",
        outcome="peak <= budget, right answers",
        recovered="the same",
        make=_huge_pages(False),
        lacks=_lacks_huge_pages,
        long=True,
    ),
)
