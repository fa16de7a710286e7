"""`python -m benchmarks.serving.main PART`: the server, measured; see the README.

load       requests of 1, 8 and 32 clients, beside llama.cpp's server and fastembed
--tables   only write the README's tables again, from results/*.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.models import ROOT
from benchmarks.serving import load as load_part
from benchmarks.serving.servers import CONTENDERS
from benchmarks.study import Parts
from pipeload.bench import cgroup
from pipeload.machine.sizes import parse_bytes

PARTS = Parts(folder=Path(__file__).parent, kinds={"load": (load_part.Report, load_part.rows)})

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def choose(
    context: typer.Context,
    tables: Annotated[bool, typer.Option("--tables", help="Only write the README's tables again.")] = False,
) -> None:
    if tables:
        PARTS.publish()
    elif context.invoked_subcommand is None:
        raise typer.BadParameter(f"name a part: {', '.join(PARTS.kinds)}")
    elif refusal := cgroup.permitted():
        raise typer.BadParameter(f"this benchmark needs memory cgroups: {refusal}")


@app.command()
def load(
    minutes: Annotated[float, typer.Option(min=0.01, help="Minutes of load, all together.")] = 20,
    clients: Annotated[str, typer.Option(metavar="NUMBERS", help="Clients, with commas.")] = "1,8,32",
    caps: Annotated[
        str, typer.Option(metavar="PART:SIZE", help="Loads and memory limits, with commas.")
    ] = "chat-fp32:250MB,chat-fp32:350MB,chat:400MB,embeddings:180MB,embeddings-large:500MB,mixed:320MB",
    grace: Annotated[float, typer.Option(metavar="SECONDS", help="Time of answers after a turn's end.")] = 30,
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
    PARTS.keep("load", report, output)


if __name__ == "__main__":
    app()
