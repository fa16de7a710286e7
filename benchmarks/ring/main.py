"""`python -m benchmarks.ring.main PART`: several machines that run one model; see the README.

answers    four models on one to four nodes of unequal budgets, beside one machine
tokens     GPT-2 XL on one, two and four nodes of 2 GB: seconds a token
cores      HiDP's two levels, each with and without, on nodes that differ in disk, processor time and cores
paper      up to 64 boards and models of up to 70 billion parameters, by the planner's own recurrence
--tables   only write the README's tables again, from results/*.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import pipeload_export
from benchmarks.models import ROOT
from benchmarks.ring import answers as answers_part
from benchmarks.ring import cores as cores_part
from benchmarks.ring import paper as paper_part
from benchmarks.ring import tokens as tokens_part
from benchmarks.study import Parts
from pipeload.format.manifest import MANIFEST_NAME

PARTS = Parts(
    folder=Path(__file__).parent,
    kinds={
        "answers": (answers_part.Report, answers_part.rows),
        "tokens": (tokens_part.Report, tokens_part.rows),
        "cores": (cores_part.Report, cores_part.rows),
        "paper": (paper_part.Report, paper_part.rows),
    },
)
MODELS = ("bert-large", "vit-large", "smollm2-135m", "gpt2-xl")

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write results here, and leave the README.")
]
Link = Annotated[int, typer.Option(metavar="MBIT", help="Rate of each node's link, in Mbit/s.")]
Counts = Annotated[list[int], typer.Option("--nodes", help="Numbers of nodes; may be repeated.")]


@app.callback(invoke_without_command=True)
def choose(
    context: typer.Context,
    tables: Annotated[bool, typer.Option("--tables", help="Only write the README's tables again.")] = False,
) -> None:
    if tables:
        PARTS.publish()
    elif context.invoked_subcommand is None:
        raise typer.BadParameter("name a part, or --tables")


@app.command()
def answers(
    models: Annotated[list[str] | None, typer.Argument(help="Names of the catalog.")] = None,
    nodes: Counts = [1, 2, 3, 4],  # noqa: B006 - typer's way
    link: Link = 1000,
    output: Output = None,
) -> None:
    """Four models on one to four nodes of unequal budgets, beside one machine."""
    console = Console()
    directories = [_directory(name, console) for name in models or MODELS]
    report = answers_part.compare(directories, nodes, bits_per_s=link * 1_000_000, console=console)
    PARTS.keep("answers", report, output)


@app.command()
def tokens(
    model: Annotated[str, typer.Argument(help="A decoder of the catalog.")] = "gpt2-xl",
    nodes: Counts = [1, 2, 4],  # noqa: B006 - typer's way
    budget: Annotated[int, typer.Option(metavar="MB", help="Budget of each node, in MB.")] = 2000,
    link: Link = 1000,
    disk: Annotated[int, typer.Option(metavar="MB", help="Throttle of each node's disk, in MB/s.")] = 400,
    output: Output = None,
) -> None:
    """GPT-2 XL on one, two and four nodes of 2 GB: seconds a token."""
    console = Console()
    report = tokens_part.measure(
        _directory(model, console),
        nodes,
        budget_bytes=budget * 1_000_000,
        bits_per_s=link * 1_000_000,
        read_bytes_per_s=disk * 1_000_000,
        console=console,
    )
    PARTS.keep("tokens", report, output)


@app.command()
def cores(
    models: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(cores_part.BUDGETS_MB)}.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each variant is run.")] = 3,
    link: Link = 1000,
    output: Output = None,
) -> None:
    """HiDP's two levels, each with and without, on nodes that differ in disk, processor time and cores."""
    console = Console()
    directories = [_directory(name, console) for name in models or cores_part.BUDGETS_MB]
    report = cores_part.compare(directories, rounds, bits_per_s=link * 1_000_000, console=console)
    PARTS.keep("cores", report, output)


@app.command()
def paper(output: Output = None) -> None:
    """Up to 64 boards and models of up to 70 billion parameters, by the planner's own recurrence."""
    PARTS.keep("paper", paper_part.imagine(), output)


def _directory(name: str, console: Console) -> Path:
    """The sharded directory of a recipe of models/catalog.toml."""
    directory = ROOT / "models" / "exported" / name
    if not (directory / MANIFEST_NAME).exists():
        console.print(f"Exporting {name} to {directory.relative_to(ROOT)} ...")
        pipeload_export.export(f"catalog:{name}", directory)
    return directory


if __name__ == "__main__":
    app()
