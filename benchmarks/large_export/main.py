"""`python -m benchmarks.large_export.main [--layers N] [--verify]`: GPT-J's shape in bfloat16 -> a model directory.

Three parts: the checkpoint is made, its bytes are copied and hashed, and it is exported. Copy and export begin with
none of the checkpoint in the page cache, and end when all is on the disk. All files are removed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.large_export.checkpoint import write_checkpoint
from pipeload.bench.machine import machine_facts
from pipeload.machine.sizes import format_bytes

RESULTS = Path(__file__).with_name("results")
_PIECE_BYTES = 16 << 20
_LOOK_S = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="of the checkpoint; GPT-J 6B has 28")
    parser.add_argument("--verify", action="store_true", help="verify the export, beside transformers too")
    parser.add_argument("--folder", type=Path, help="on a disk with room for three times the weights")
    options = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="large-export-", dir=options.folder) as folder:
        source = Path(folder) / "checkpoint"
        nbytes = write_checkpoint(source, options.layers)
        record = {"layers": options.layers, "verified": options.verify, "weight_bytes": nbytes}
        record |= _copy(source, Path(folder) / "copy")
        record |= _export(source, Path(folder) / "model", verify=options.verify)
    record["ratio"] = record["export_s"] / record["copy_s"]
    RESULTS.mkdir(exist_ok=True)
    name = f"gpt-j-{options.layers}{'-verified' if options.verify else ''}.json"
    (RESULTS / name).write_text(json.dumps(record | {"machine": machine_facts()}, indent=1) + "\n")
    table = Table("layers", "weights", "copied and hashed", "of processors", "exported", "of processors", "peak RSS")
    times = [f"{record[key]:.0f} s" for key in ("copy_s", "copy_cpu_s", "export_s", "export_cpu_s")]
    sizes = [format_bytes(record[key]) for key in ("weight_bytes", "peak_rss_bytes")]
    table.add_row(str(options.layers), sizes[0], *times, sizes[1])
    console.print(table, record["steps_s"])
    return 0


def _forget_cached(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _copy(source: Path, target: Path) -> dict[str, float]:
    """Seconds of copying and hashing the files, until they are on the disk; the copies are removed."""
    _forget_cached(source)
    target.mkdir()
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    for path in sorted(source.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as given, (target / path.name).open("wb") as made:
            while piece := given.read(_PIECE_BYTES):
                digest.update(piece)
                made.write(piece)
            made.flush()
            os.fsync(made.fileno())
    taken = {"copy_s": time.perf_counter() - begin_s, "copy_cpu_s": time.process_time() - begin_cpu_s}
    for path in target.iterdir():
        path.unlink()
    return taken


_PROGRAM = """
import json, sys, time
from pipeload_export import export
steps, begin_s = {}, time.perf_counter()
def progress(what, done, total):
    steps.setdefault(what, round(time.perf_counter() - begin_s, 1))
export(sys.argv[1], sys.argv[2], verify=sys.argv[3] == "True", progress=progress)
print(json.dumps(steps))
"""


def _export(source: Path, target: Path, *, verify: bool) -> dict[str, Any]:
    """Seconds of the export, when each of its steps began, and the peak of the memory of all its processes."""
    _forget_cached(source)
    begin_s, before = time.perf_counter(), os.times()
    command = [sys.executable, "-c", _PROGRAM, str(source), str(target), str(verify)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak: list[int] = [0]
        watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), peak), daemon=True)
        watcher.start()
        printed, _ = process.communicate()
        taken_s = time.perf_counter() - begin_s
        watcher.join()
    if process.returncode:
        raise SystemExit(f"The export ended with {process.returncode}.")
    steps, after = json.loads(printed.splitlines()[-1]), os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return {"export_s": taken_s, "export_cpu_s": cpu_s, "peak_rss_bytes": peak[0], "steps_s": steps}


def _watch(process: psutil.Process, peak: list[int]) -> None:
    """Keep the largest sum of the resident memory of a process and its children, mapped files included."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        resident = 0
        try:
            for one in (process, *process.children(recursive=True)):
                resident += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        peak[0] = max(peak[0], resident)
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    sys.exit(main())
