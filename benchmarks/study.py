"""A comparison of several models with the harness of `pipeload bench`: run it, keep it, put its tables into the README.

A folder's `main.py` says what is compared. Its command line:

    python -m benchmarks.FOLDER.main                     all models, results and pictures kept in results/
    python -m benchmarks.FOLDER.main bert-large          one of them
    python -m benchmarks.FOLDER.main --quick             a small model, once, nothing kept
    python -m benchmarks.FOLDER.main --tables            only make the README's tables and pictures again, from results/
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console

from benchmarks.models import exported, joined
from pipeload.bench.harness import Report, Settings, compare
from pipeload.bench.machine import machine_line
from pipeload.bench.pictures import agents_figure, draw
from pipeload.bench.record import Record
from pipeload.bench.spec import ContenderName, from_json, to_json
from pipeload.bench.table import table
from pipeload.cli.progress import progress_bars
from pipeload.format.manifest import read

__all__ = ["LARGE", "Case", "Parts", "main", "markdown_table", "publish"]

_BEGIN, _END = "<!-- results: python -m benchmarks.{} -->", "<!-- end of results -->"

Rows = Callable[[Sequence[Record]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model of a comparison, and how it is run.

    Attributes:
        name: its recipe in models/catalog.toml.
        contenders: who.
        percents: budgets in percent of the weights; None for no limit.
        disks: throttles in MB/s; None for none.
        settling, passes, rounds, sizes, loaders, cold: see `Settings`.
    """

    name: str
    contenders: tuple[ContenderName, ...]
    percents: tuple[float | None, ...]
    disks: tuple[int | None, ...] = (None,)
    settling: int = 5
    passes: int = 5
    rounds: int = 3
    sizes: dict[str, int] = field(default_factory=dict)
    loaders: tuple[int, ...] = ()
    cold: bool = False


LARGE: dict[str, dict[str, int]] = {
    "bert-large": {"sequence_length": 128},
    "vit-large": {"height": 224, "width": 224},
    "gpt2-xl": {},
}
"""The models of the paper, and the sizes of their inputs; GPT-2 XL decodes after a prompt of 16 tokens."""


def main(folder: Path, cases: Sequence[Case], rows: Rows, console: Console | None = None) -> int:
    """Run what the command line asks for. Returns the exit code: 1 when an answer of pipeload is not right."""
    console = console or Console(width=150)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(case.name for case in cases)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a small model, once, nothing kept")
    parser.add_argument("--tables", action="store_true", help="only make the README's tables and pictures again")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--passes", type=int)
    arguments = parser.parse_args()
    results = folder / "results"
    if arguments.quick:
        # MiniLM is smaller than the interpreter: budgets below that are refused, which is a part of the check.
        cases = [
            replace(cases[0], name="minilm", percents=(300, None), sizes={"sequence_length": 32}, passes=2, rounds=1)
        ]
    elif unknown := set(arguments.models) - {case.name for case in cases}:
        parser.error(f"no model {', '.join(unknown)}; the known ones are {', '.join(case.name for case in cases)}")
    reports = []
    for case in [] if arguments.tables else cases:
        if arguments.models and case.name not in arguments.models:
            continue
        case = replace(case, rounds=arguments.rounds or case.rounds, passes=arguments.passes or case.passes)
        report = _run(case, console)
        reports.append(report)
        console.print(table(report.records))
        if not arguments.quick:
            results.mkdir(exist_ok=True)
            report.write(results / f"{case.name}.json")
    if arguments.quick:
        console.print(rows(reports[0].records), markup=False, soft_wrap=True)
    else:
        _publish(folder, rows)
    ours = [record for report in reports for record in report.records if record.contender == "pipeload"]
    return 0 if all(record.ok for record in ours) else 1


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a page; the first column is left-aligned, the others are numbers."""
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _run(case: Case, console: Console) -> Report:
    directory, _ = exported(case.name, console)
    manifest = read(directory)
    with tempfile.TemporaryDirectory(prefix="pipeload-bench-") as folder, progress_bars() as progress:
        settings = Settings(
            directory=directory,
            unsplit=joined(directory, Path(folder)),
            contenders=case.contenders,
            budgets=tuple(None if p is None else int(manifest.weight_bytes * p / 100) for p in case.percents),
            disks=tuple(None if rate is None else rate * 1_000_000 for rate in case.disks),
            settling=case.settling,
            passes=case.passes,
            rounds=case.rounds,
            sizes={name: size for name, size in case.sizes.items() if name in manifest.dims},
            loaders=case.loaders,
            cold=case.cold,
        )
        return compare(settings, progress, lambda text: console.print(text, style="yellow"))


def _publish(folder: Path, rows: Rows) -> None:
    """Pictures and tables of all results that are kept."""
    reports = [from_json(path.read_bytes(), Report) for path in sorted((folder / "results").glob("*.json"))]
    if not reports:
        return
    for report in reports:
        draw(report, folder / "results" / report.settings.directory.name)
    records = [record for report in reports for record in report.records]
    if any(record.loaders for record in records):
        agents_figure(records, reports[0].machine).savefig(folder / "results" / "agents.png")
    publish(folder / "README.md", f"{folder.name}.main --tables", reports[0].machine, rows(records))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Parts of a benchmark that has several, and what is kept of each: `results/PART.json`, and a table on the page.

    Attributes:
        folder: of the benchmark.
        kinds: name -> the class of the part's results, which have `machine` and `ok`, and its table.
        pictures: name -> draws the results, for `results/PART.png`.
        commands: name -> the words that make it, where they are not its name.
    """

    folder: Path
    kinds: Mapping[str, tuple[Any, Callable[[Any], str]]]
    pictures: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)

    def keep(self, part: str, report: Any, output: Path | None) -> None:
        """Write the results, print their table, and end with 1 if an answer is not right.

        Args:
            part: its name.
            report: its results; those with a wrong answer go to `results/PART.wrong.json`, and not on the page.
            output: a file for them, which leaves the page as it is; None takes their place.
        """
        path = output or (self._path(part) if report.ok else self._path(part).with_suffix(".wrong.json"))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(msgspec.json.format(to_json(report), indent=1) + b"\n")
        Console().print(self.kinds[part][1](report), markup=False, highlight=False, soft_wrap=True)
        if output is None and report.ok:
            self._publish(part)
        if not report.ok:
            raise typer.Exit(1)

    def publish(self) -> None:
        """Tables and pictures of all results that are kept."""
        for part in self.kinds:
            if self._path(part).exists():
                self._publish(part)

    def _publish(self, part: str) -> None:
        kind, rows = self.kinds[part]
        report = from_json(self._path(part).read_bytes(), kind)
        publish(
            self.folder / "README.md",
            f"{self.folder.name}.main {self.commands.get(part, part)}",
            report.machine,
            rows(report),
        )
        if part in self.pictures:
            self.pictures[part](report).savefig(self._path(part).with_suffix(".png"))

    def _path(self, part: str) -> Path:
        return self.folder / "results" / f"{part}.json"


def publish(page: Path, command: str, machine: Mapping[str, Any], text: str) -> None:
    """Put results into their place on a page, which is marked by the command that makes them."""
    begin = _BEGIN.format(command)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(_END)}", re.DOTALL)
    old = page.read_text()
    if not pattern.search(old):
        sys.exit(f"{page} has no place for results: write '{begin}' and '{_END}' into it.")
    page.write_text(pattern.sub(lambda _: f"{begin}\n{machine_line(machine)}\n\n{text}\n{_END}", old))
