"""`python -m benchmarks.serving.main PART`: the server, measured; see the README.

load       requests of 1, 8 and 32 clients, beside llama.cpp's server and fastembed
--tables   only write the README's tables again, from results/*.json
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from benchmarks.models import ROOT
from benchmarks.serving import load as load_part
from benchmarks.serving.servers import CONTENDERS
from benchmarks.study import publish
from pipeload.bench import cgroup
from pipeload.bench.spec import from_json, to_json
from pipeload.machine.sizes import parse_bytes

FOLDER = Path(__file__).parent
PARTS: dict[str, tuple[Any, Callable[[Any], str]]] = {"load": (load_part.Report, load_part.rows)}
"""The class of a part's results, and its table."""

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def choose(
    context: typer.Context,
    tables: Annotated[bool, typer.Option("--tables", help="Only write the README's tables again.")] = False,
) -> None:
    if tables:
        for part in PARTS:
            _publish(part)
    elif context.invoked_subcommand is None:
        raise typer.BadParameter(f"name a part: {', '.join(PARTS)}")
    elif refusal := cgroup.permitted():
        raise typer.BadParameter(f"this benchmark needs memory cgroups: {refusal}")


@app.command()
def load(
    minutes: Annotated[float, typer.Option(min=0.01, help="Minutes of load, all together.")] = 20,
    clients: Annotated[str, typer.Option(metavar="NUMBERS", help="Clients, with commas.")] = "1,8,32",
    caps: Annotated[
        str, typer.Option(metavar="PART:SIZE", help="Loads and memory limits, with commas.")
    ] = "chat:200MB,chat:400MB,embeddings:180MB,embeddings:400MB,mixed:320MB,mixed:700MB",
    grace: Annotated[float, typer.Option(metavar="SECONDS", help="Time of answers after a turn's end.")] = 10,
    disk: Annotated[
        str, typer.Option(metavar="RATE", help="Throttle of the disk, such as 400MB/s, or none.")
    ] = "400MB/s",
    environments: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the virtual environments of the others are.")
    ] = ROOT / ".venv-rivals",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write results here, and leave the README.")
    ] = None,
) -> None:
    """Requests of many clients, beside llama.cpp's server and fastembed."""
    cases = []
    for word in caps.split(","):
        part, _, size = word.partition(":")
        if part not in CONTENDERS:
            raise typer.BadParameter(f"--caps names '{part}'; the loads are {', '.join(CONTENDERS)}")
        cases.append(load_part.Case(part=part, cap_bytes=parse_bytes(size)))
    report = load_part.compare(
        cases,
        clients=[int(number) for number in clients.split(",")],
        minutes=minutes,
        grace_s=grace,
        disk_bytes_per_s=None if disk == "none" else parse_bytes(disk.removesuffix("/s")),
        environments=environments,
        console=Console(),
    )
    _keep("load", report, output)


def _keep(part: str, report: Any, output: Path | None) -> None:
    """Write the results, print their table, and end with 1 if an answer is not right."""
    path = output or FOLDER / "results" / f"{part}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(to_json(report), indent=1) + b"\n")
    Console().print(PARTS[part][1](report), markup=False, highlight=False, soft_wrap=True)
    if output is None:
        _publish(part)
    if not report.ok:
        raise typer.Exit(1)


def _publish(part: str) -> None:
    """The table of the kept results, if there are any."""
    path = FOLDER / "results" / f"{part}.json"
    if path.exists():
        kind, rows = PARTS[part]
        report = from_json(path.read_bytes(), kind)
        publish(FOLDER / "README.md", f"serving.main {part}", report.machine, rows(report))


if __name__ == "__main__":
    app()
