"""`python -m benchmarks.generation.main PART`: text generation, measured in six ways; see the README.

rivals     GPT-2 XL under memory caps, beside llama.cpp, accelerate and AirLLM
lookup     answers that repeat their prompt, with and without guessed tokens
bits       weights of 4 and 8 bits, beside llama.cpp
drafts     a model that drafts for itself, beside the same without its draft
callers    eight callers at once, beside one
long       seconds and memory over a long text
--tables   only write the README's tables and picture again, from results/*.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.generation import bits as bits_part
from benchmarks.generation import callers as callers_part
from benchmarks.generation import drafts as drafts_part
from benchmarks.generation import long as long_part
from benchmarks.generation import lookup as lookup_part
from benchmarks.generation import rivals as rivals_part
from benchmarks.generation.small import small_model
from benchmarks.models import ROOT
from benchmarks.study import Parts
from pipeload.bench import cgroup
from pipeload.machine.sizes import parse_bytes

PARTS = Parts(
    folder=Path(__file__).parent,
    kinds={
        "rivals": (rivals_part.Report, rivals_part.rows),
        "lookup": (lookup_part.Report, lookup_part.rows),
        "bits": (bits_part.Report, bits_part.rows),
        "drafts": (drafts_part.Report, drafts_part.rows),
        "callers": (callers_part.Report, callers_part.rows),
        "long": (long_part.Report, long_part.rows),
    },
    pictures={"long": long_part.figure},
)

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)
Cap = Annotated[str, typer.Option(metavar="SIZE", help="Limit of the memory cgroup.")]
Disk = Annotated[str, typer.Option(metavar="RATE", help="Throttle of the disk, such as 400MB/s, or none.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to generate.")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write results here, and leave the README.")
]


@app.callback(invoke_without_command=True)
def choose(
    context: typer.Context,
    tables: Annotated[bool, typer.Option("--tables", help="Only write the README's tables and picture again.")] = False,
) -> None:
    if tables:
        PARTS.publish()
    elif context.invoked_subcommand is None:
        raise typer.BadParameter(f"name a part: {', '.join(PARTS.kinds)}")
    elif refusal := cgroup.permitted():
        raise typer.BadParameter(f"this benchmark needs memory cgroups: {refusal}")


@app.command()
def rivals(
    caps: Annotated[str, typer.Option(metavar="SIZES", help="Memory limits, with commas.")] = "1GB,2GB,4GB,5.5GB",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that count.")] = 3,
    settling: Annotated[int, typer.Option(min=0, help="Tokens after the first that do not count.")] = 2,
    contenders: Annotated[
        str, typer.Option(metavar="NAMES", help="Whom to compare with pipeload, with commas.")
    ] = ",".join(rivals_part.CONTENDERS),
    disk: Annotated[str, typer.Option(metavar="RATE", help="Throttle of the disk.")] = "400MB/s",
    environments: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the virtual environments of the others are.")
    ] = ROOT / ".venv-rivals",
    output: Output = None,
) -> None:
    """GPT-2 XL under memory caps, beside other engines."""
    rate = _rate(disk)
    if rate is None:
        raise typer.BadParameter("the comparison needs a throttle, such as --disk 400MB/s")
    names = list(dict.fromkeys(["pipeload", *contenders.split(",")]))
    if unknown := set(names) - set(rivals_part.CONTENDERS):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(rivals_part.CONTENDERS)}")
    report = rivals_part.compare(
        names,
        [parse_bytes(cap) for cap in caps.split(",")],
        tokens=tokens,
        settling=settling,
        disk_bytes_per_s=rate,
        environments=environments,
        console=Console(),
    )
    PARTS.keep("rivals", report, output)


@app.command()
def lookup(
    cap: Cap = "250MB",
    disk: Disk = "400MB/s",
    tokens: Tokens = 96,
    guesses: Annotated[int, typer.Option(min=1, help="Most tokens that are guessed in a sweep.")] = 10,
    output: Output = None,
) -> None:
    """Answers that repeat their prompt, with and without guessed tokens."""
    with small_model(parse_bytes(cap), _rate(disk), Console()) as model:
        PARTS.keep("lookup", lookup_part.compare(model, tokens, guesses), output)


@app.command()
def bits(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that count.")] = 16,
    settling: Annotated[int, typer.Option(min=0, help="Tokens after the first that do not count.")] = 8,
    disk: Annotated[str, typer.Option(metavar="RATE", help="Throttle of the disk.")] = "400MB/s",
    environments: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the virtual environments of the others are.")
    ] = ROOT / ".venv-rivals",
    output: Output = None,
) -> None:
    """Weights of 4 and 8 bits, beside llama.cpp."""
    rate = _rate(disk)
    if rate is None:
        raise typer.BadParameter("the comparison needs a throttle, such as --disk 400MB/s")
    report = bits_part.compare(
        tokens=tokens, settling=settling, disk_bytes_per_s=rate, environments=environments, console=Console()
    )
    PARTS.keep("bits", report, output)


@app.command()
def drafts(
    models: Annotated[str, typer.Option(metavar="NAMES", help="With commas.")] = ",".join(drafts_part.MODELS),
    percents: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Memory for weights, in percent of the model's, with commas.")
    ] = "50,75",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turn.")] = 2,
    disk: Annotated[str, typer.Option(metavar="RATE", help="Throttle of the disk.")] = "400MB/s",
    output: Output = None,
) -> None:
    """A model that drafts for itself, beside the same without its draft."""
    rate = _rate(disk)
    if rate is None:
        raise typer.BadParameter("the comparison needs a throttle, such as --disk 400MB/s")
    names = tuple(models.split(","))
    if unknown := set(names) - set(drafts_part.MODELS):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(drafts_part.MODELS)}")
    report = drafts_part.compare(
        names,
        percents=tuple(int(percent) for percent in percents.split(",")),
        rounds=rounds,
        disk_bytes_per_s=rate,
        console=Console(),
    )
    PARTS.keep("drafts", report, output)


@app.command()
def callers(cap: Cap = "250MB", disk: Disk = "400MB/s", tokens: Tokens = 24, output: Output = None) -> None:
    """Eight callers at once, beside one."""
    with small_model(parse_bytes(cap), _rate(disk), Console()) as model:
        PARTS.keep("callers", callers_part.compare(model, tokens), output)


@app.command()
def long(cap: Cap = "900MB", disk: Disk = "none", tokens: Tokens = 2000, output: Output = None) -> None:
    """Seconds and memory over a long text."""
    with small_model(parse_bytes(cap), _rate(disk), Console()) as model:
        report = long_part.measure(model, tokens)
    PARTS.keep("long", report, output)


def _rate(text: str) -> int | None:
    return None if text == "none" else parse_bytes(text.removesuffix("/s"))


if __name__ == "__main__":
    app()
