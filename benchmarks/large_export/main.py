"""`python -m benchmarks.large_export.main [--layers N] [--verify] [--generate]`: GPT-J's shape -> model directories.

The checkpoint of bfloat16 is made, its bytes are copied and hashed, and it is exported; the directory is then converted
to weights of 8 and 4 bits, as `export --weights int8` does with it. Each begins with none of what it reads in the page
cache, and ends when all is on the disk. With --generate (root, for the cgroups) each directory then makes a few tokens
under memory caps. All files are removed at the end.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.large_export.checkpoint import write_checkpoint
from benchmarks.large_export.tokens import generate, token_rows
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.format.manifest import read
from pipeload.machine.sizes import format_bytes
from pipeload_export.graph.graph import known_constant
from pipeload_export.rewrite.rounding import Rounding, round_rows

RESULTS = Path(__file__).with_name("results")
_PIECE_BYTES = 16 << 20
_LOOK_S = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="of the checkpoint; GPT-J 6B has 28")
    parser.add_argument("--verify", action="store_true", help="verify the export, beside transformers too")
    parser.add_argument("--folder", type=Path, help="on a disk with room for three times the weights")
    parser.add_argument("--generate", action="store_true", help="make tokens under memory caps")
    options = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="large-export-", dir=options.folder) as folder:
        source = Path(folder) / "checkpoint"
        nbytes = write_checkpoint(source, options.layers)
        record = {"layers": options.layers, "verified": options.verify, "weight_bytes": nbytes}
        record |= _copy(source, Path(folder) / "copy")
        model = Path(folder) / "model"
        record |= _measured(_EXPORT, source, model, str(options.verify))
        record["ratio"] = record["taken_s"] / record["copy_s"]
        directories = {"bf16": model}
        for weights in ("int8", "int4"):
            directories[weights] = Path(folder) / weights
            record[weights] = _measured(_CONVERT, model, directories[weights], weights)
            record[weights] |= {"round_s": _round_s(source, weights, options.layers)}
        if options.generate:
            record["tokens"] = [asdict(one) for name, at in directories.items() for one in generate(name, at, console)]
    RESULTS.mkdir(exist_ok=True)
    name = f"gpt-j-{options.layers}{'-verified' if options.verify else ''}.json"
    (RESULTS / name).write_text(json.dumps(record | {"machine": machine_facts()}, indent=1) + "\n")
    console.print(markdown_table(*_rows(record)), record["steps_s"], highlight=False)
    if options.generate:
        console.print(token_rows(record["tokens"]), highlight=False)
    return 0


def _rows(record: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    names = ("step", "seconds", "of processors", "peak RSS", "bytes made", "rounding alone")
    lines = [["copied and hashed", *(f"{record[key]:.0f} s" for key in ("copy_s", "copy_cpu_s")), "-", "-", "-"]]
    for step, found in (("exported", record), *((f"converted to {name}", record[name]) for name in ("int8", "int4"))):
        times = [f"{found[key]:.0f} s" for key in ("taken_s", "taken_cpu_s")]
        sizes = [format_bytes(found[key]) for key in ("peak_rss_bytes", "made_bytes")]
        lines.append([step, *times, *sizes, f"{found['round_s']:.0f} s" if "round_s" in found else "-"])
    return names, lines


def _round_s(source: Path, weights: str, layers: int) -> float:
    """Seconds in which one core rounds the matrices of all layers: those of one layer, times their number."""
    import numpy as np
    from safetensors import safe_open

    rounding, seconds = Rounding(bits=int(weights.removeprefix("int")), block_size=32), 0.0
    with safe_open(sorted(source.glob("*.safetensors"))[1], framework="pt") as file:
        names = file.keys()
        for name in names:
            values = file.get_tensor(name).float().numpy()
            if values.ndim == 2:
                constant = known_constant(np.ascontiguousarray(values))
                begin_s = time.perf_counter()
                for _ in round_rows(constant, rounding, transposed=False):
                    pass
                seconds += time.perf_counter() - begin_s
    return seconds * layers


def _forget_cached(folder: Path) -> None:
    for file in (path for path in folder.rglob("*") if path.is_file()):
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


_EXPORT = """
import json, sys, time
from pipeload_export import export
steps, begin_s = {}, time.perf_counter()
def progress(what, done, total):
    steps.setdefault(what, round(time.perf_counter() - begin_s, 1))
export(sys.argv[1], sys.argv[2], verify=sys.argv[3] == "True", progress=progress)
print(json.dumps(steps))
"""
_CONVERT = """
import json, sys, time
from pipeload_export import convert
steps, begin_s = {}, time.perf_counter()
def progress(what, done, total):
    steps.setdefault(what, round(time.perf_counter() - begin_s, 1))
convert(sys.argv[1], sys.argv[2], weights=sys.argv[3], verify=False, progress=progress)
print(json.dumps(steps))
"""


def _measured(program: str, source: Path, target: Path, argument: str) -> dict[str, Any]:
    """Seconds of a program, when each of its steps began, and the peak of the memory of all its processes."""
    _forget_cached(source)
    begin_s, before = time.perf_counter(), os.times()
    command = [sys.executable, "-c", program, str(source), str(target), argument]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak: list[int] = [0]
        watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), peak), daemon=True)
        watcher.start()
        printed, _ = process.communicate()
        taken_s = time.perf_counter() - begin_s
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{target.name} ended with {process.returncode}.")
    steps, after = json.loads(printed.splitlines()[-1]), os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    made_bytes = read(target).weight_bytes
    return {
        "taken_s": taken_s,
        "taken_cpu_s": cpu_s,
        "peak_rss_bytes": peak[0],
        "made_bytes": made_bytes,
        "steps_s": steps,
    }


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
