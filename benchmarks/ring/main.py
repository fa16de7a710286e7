"""`python -m benchmarks.ring.main PART`: several machines that run one model; see the README.

answers    four models on one to four nodes of unequal budgets, beside one machine
tokens     GPT-2 XL on one, two and four nodes of 2 GB: seconds a token
moves      a text whose model moves: its caches copied, and computed again
peers      the same of one text, beside llama.cpp and its rpc-servers on the same nodes
trace      what pipeload does when links, processors, memory and nodes change, beside three that do nothing
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
from benchmarks.ring import moves as moves_part
from benchmarks.ring import paper as paper_part
from benchmarks.ring import peers as peers_part
from benchmarks.ring import tokens as tokens_part
from benchmarks.ring import trace as trace_part
from benchmarks.study import Parts
from pipeload.format.manifest import MANIFEST_NAME

PARTS = Parts(
    folder=Path(__file__).parent,
    kinds={
        "answers": (answers_part.Report, answers_part.rows),
        "answers-100mbit": (answers_part.Report, answers_part.rows),
        "tokens": (tokens_part.Report, tokens_part.rows),
        "tokens-100mbit": (tokens_part.Report, tokens_part.rows),
        "moves": (moves_part.Report, moves_part.rows),
        "peers": (peers_part.Report, peers_part.rows),
        "trace": (trace_part.Report, trace_part.rows),
        "paper": (paper_part.Report, paper_part.rows),
    },
    commands={
        part: part.replace("-100mbit", " --link 100 --latency 5") for part in ("answers-100mbit", "tokens-100mbit")
    },
)
NETWORKS = {(1000, 0.3): "", (100, 5.0): "-100mbit"}
"""Those that the page has tables of, in Mbit/s and ms."""
MODELS = ("bert-large", "vit-large", "smollm2-135m", "gpt2-xl")

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write results here, and leave the README.")
]
Link = Annotated[int, typer.Option(metavar="MBIT", help="Rate of each node's link, in Mbit/s.")]
Latency = Annotated[float, typer.Option(metavar="MS", help="From one machine to another, in milliseconds.")]
Budget = Annotated[int, typer.Option(metavar="MB", help="Budget of each node, in MB.")]
Disk = Annotated[int, typer.Option(metavar="MB", help="Throttle of each node's disk, in MB/s.")]
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
    latency: Latency = 0.3,
    output: Output = None,
) -> None:
    """Four models on one to four nodes of unequal budgets, beside one machine."""
    console = Console()
    part = _part("answers", link, latency, output)
    directories = [_directory(name, console) for name in models or MODELS]
    report = answers_part.compare(
        directories, nodes, bits_per_s=link * 1_000_000, latency_s=latency / 1000, console=console
    )
    PARTS.keep(part, report, output)


@app.command()
def tokens(
    model: Annotated[str, typer.Argument(help="A decoder of the catalog.")] = "gpt2-xl",
    nodes: Counts = [1, 2, 4],  # noqa: B006 - typer's way
    budget: Budget = 2000,
    link: Link = 1000,
    latency: Latency = 0.3,
    disk: Disk = 400,
    output: Output = None,
) -> None:
    """GPT-2 XL on one, two and four nodes of 2 GB: seconds a token."""
    console, part = Console(), _part("tokens", link, latency, output)
    report = tokens_part.measure(
        _directory(model, console),
        nodes,
        budget_bytes=budget * 1_000_000,
        bits_per_s=link * 1_000_000,
        latency_s=latency / 1000,
        read_bytes_per_s=disk * 1_000_000,
        console=console,
    )
    PARTS.keep(part, report, output)


@app.command()
def moves(
    model: Annotated[str, typer.Argument(help="A decoder of the catalog.")] = "smollm2-135m",
    tokens: Annotated[list[int], typer.Option(help="Lengths of the text; may be repeated.")] = [64, 512, 2048],  # noqa: B006
    budget: Annotated[int, typer.Option(metavar="MB", help="Budget of each node, in MB.")] = 600,
    link: Link = 1000,
    latency: Latency = 0.3,
    output: Output = None,
) -> None:
    """A text whose model moves: its caches copied, and computed again."""
    console = Console()
    report = moves_part.measure(
        _directory(model, console),
        tokens,
        budget_bytes=budget * 1_000_000,
        bits_per_s=link * 1_000_000,
        latency_s=latency / 1000,
        console=console,
    )
    PARTS.keep("moves", report, output)


@app.command()
def peers(
    model: Annotated[str, typer.Argument(help="A seeded GPT-2 of the catalog.")] = "gpt2-xl",
    *,
    llama: Annotated[Path, typer.Option(metavar="FOLDER", help="With ggml-rpc-server and llama.cpp's libraries.")],
    environments: Annotated[
        Path, typer.Option(metavar="FOLDER", help="With an environment `llama` that has llama-cpp-python.")
    ] = ROOT / ".venv-rivals",
    nodes: Counts = [1, 2, 4],  # noqa: B006 - typer's way
    budget: Budget = 2000,
    link: Link = 1000,
    latency: Latency = 0.3,
    disk: Disk = 400,
    output: Output = None,
) -> None:
    """GPT-2 XL on one, two and four nodes of 2 GB, beside llama.cpp and its rpc-servers."""
    console = Console()
    report = peers_part.compare(
        _directory(model, console),
        nodes,
        llama=peers_part.Llama.found(llama, environments),
        budget_bytes=budget * 1_000_000,
        bits_per_s=link * 1_000_000,
        latency_s=latency / 1000,
        read_bytes_per_s=disk * 1_000_000,
        console=console,
    )
    PARTS.keep("peers", report, output)


@app.command()
def trace(
    short: Annotated[bool, typer.Option("--short", help="Shorter, for development; the page stays.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="A contender; may be repeated. Keeps nothing.")] = None,
    output: Output = None,
) -> None:
    """What pipeload does when links, processors, memory and nodes change, beside three that do nothing."""
    console = Console()
    window_s = trace_part.SHORT_WINDOW_S if short else trace_part.WINDOW_S
    report = trace_part.live(_directory("bert-large", console), window_s=window_s, only=only or (), console=console)
    if only is None and (output or not short):
        PARTS.keep("trace", report, output)


@app.command()
def paper(output: Output = None) -> None:
    """Up to 64 boards and models of up to 70 billion parameters, by the planner's own recurrence."""
    PARTS.keep("paper", paper_part.imagine(), output)


def _part(part: str, link: int, latency: float, output: Path | None) -> str:
    """The name of a part's results on a network."""
    if (link, latency) not in NETWORKS and output is None:
        known = ", ".join(f"--link {rate} --latency {delay:g}" for rate, delay in NETWORKS)
        raise typer.BadParameter(f"the page has tables of {known}; name a file with --output for another network")
    return f"{part}{NETWORKS.get((link, latency), '')}"


def _directory(name: str, console: Console) -> Path:
    """The sharded directory of a recipe of models/catalog.toml."""
    directory = ROOT / "models" / "exported" / name
    if not (directory / MANIFEST_NAME).exists():
        console.print(f"Exporting {name} to {directory.relative_to(ROOT)} ...")
        pipeload_export.export(f"catalog:{name}", directory)
    return directory


if __name__ == "__main__":
    app()
