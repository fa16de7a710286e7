"""`python -m benchmarks.budget_promise.main`: does the peak of the process stay below its budget, and near it?"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.models import ROOT, exported
from benchmarks.study import markdown_table
from pipeload.bench.cgroup import evict
from pipeload.machine.sizes import format_bytes

_FOLDER = Path(__file__).parent
_MODELS = {
    "minilm": ("embed", 128_000_000, []),
    "smollm2-135m": ("generate", 256_000_000, []),
    "bert-large": ("run", 303_000_000, ["--size", "128"]),
}
_TIMEOUT_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to start a process.

    Attributes:
        name: of its rows.
        options: of `program.py`, by model, and "" for all.
        warm: runs begin with the cache of the runs before them; otherwise with an empty one.
        python: the interpreter's place among those that were given.
    """

    name: str
    options: dict[str, list[str]]
    warm: bool = False
    python: str = ""


_MANY = {"minilm": ["--calls", "40"], "smollm2-135m": ["--calls", "6"], "bert-large": ["--calls", "20"]}
CASES = (
    Case(name="first run", options=_MANY),
    Case(name="warm run", options=_MANY, warm=True),
    Case(name="forked child", options={"": ["--fork", "--calls", "4"]}),
    Case(name="8 callers", options={"": ["--callers", "8", "--calls", "3"]}),
    Case(name="8 threads", options={"": ["--threads", "8", "--calls", "4"]}),
    Case(
        name="2,000 passes",
        options={
            "minilm": ["--calls", "2000"],
            "smollm2-135m": ["--calls", "250"],
            "bert-large": ["--calls", "2000", "--size", "8"],
        },
    ),
    Case(name="slow cores", options={"": ["--slow-cores"], **_MANY}),
    Case(name="onnxruntime 1.32", options=_MANY, python="latest"),
    Case(name="Python 3.13", options=_MANY, python="newer"),
)


def run(case: Case, model: str, directory: Path, python: str, cache: Path) -> dict[str, Any]:
    """Run one process of a case, and return the figures that it prints."""
    task, budget, sizes = _MODELS[model]
    evict(path for path in directory.rglob("*") if path.is_file())
    options = [*sizes, *case.options.get("", []), *case.options.get(model, [])]
    command = [python, str(_FOLDER / "program.py"), str(directory), task, str(budget), *options]
    environment = {**os.environ, "PIPELOAD_CACHE": str(cache), "PYTHONPATH": str(ROOT / "engine")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        return {"case": case.name, "model": model, "error": done.stderr.strip().splitlines()[-1:]}
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"case": case.name, "model": model, **facts}


def records(given: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """All cases that were asked for, run by run."""
    pythons = {"": sys.executable, "latest": given.latest, "newer": given.newer}
    for model in given.models or _MODELS:
        directory = given.exported / model if given.exported else exported(model, console, weights="fp32")[0]
        for case in CASES:
            if (given.cases and case.name not in given.cases) or not pythons[case.python]:
                continue
            with tempfile.TemporaryDirectory() as place:
                cache = Path(place) / "cache"
                if case.warm:
                    run(case, model, directory, pythons[case.python], cache)
                for number in range(given.runs):
                    record = run(case, model, directory, pythons[case.python], cache)
                    yield {**record, "run": number}
                    if not case.warm:
                        shutil.rmtree(cache, ignore_errors=True)


def rows(found: list[dict[str, Any]]) -> str:
    """A row for each case and model: peak over budget, run by run."""
    lines = []
    for case in CASES:
        for model, (_, budget, _) in _MODELS.items():
            own = [r for r in found if (r["case"], r["model"]) == (case.name, model)]
            if own:
                shares = ["failed" if _failed(r) else f"{r['peak_bytes'] / budget:.3f}" for r in own]
                passes = max((r.get("passes", 0) for r in own), default=0)
                lines.append([case.name, model, format_bytes(budget), str(passes), ", ".join(shares)])
    return markdown_table(("case", "model", "budget", "passes", "peak / budget, run by run"), lines)


def _failed(record: dict[str, Any]) -> bool:
    return "error" in record or bool(record["faults"])


def main() -> int:
    """Run what was asked for, or print the table of what is kept. Returns 1 when a process exceeded its budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", nargs="*", choices=_MODELS)
    parser.add_argument("--cases", nargs="*", choices=[case.name for case in CASES])
    parser.add_argument("--exported", type=Path, help="where the models lie; else they are exported")
    parser.add_argument("--latest", help="a Python with the newest onnxruntime")
    parser.add_argument("--newer", help="a newer Python")
    parser.add_argument("--results", type=Path, default=_FOLDER / "results" / "results.json")
    parser.add_argument("--tables", action="store_true", help="only print the table of the kept results")
    given = parser.parse_args()
    console = Console()
    kept = json.loads(given.results.read_text()) if given.results.exists() else []
    if not given.tables:
        for record in records(given, console):
            same = ("case", "model", "run")
            kept = [r for r in kept if any(r[key] != record[key] for key in same)] + [record]
            given.results.parent.mkdir(exist_ok=True)
            given.results.write_text(json.dumps(kept, indent=1) + "\n")
            share = record.get("peak_bytes", 0) / record.get("budget_bytes", 1)
            console.print(record["case"], record["model"], f"{share:.3f}", record.get("error") or record["faults"])
    print(rows(kept))
    return int(any(_failed(r) or r["peak_bytes"] > r["budget_bytes"] for r in kept))


if __name__ == "__main__":
    sys.exit(main())
