"""`pipeload bench`: pipeload beside other ways to run the same model, under the same limits."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from pipeload.bench.harness import Settings, compare
from pipeload.bench.pictures import draw
from pipeload.bench.spec import CONTENDERS, ContenderName, Unsplit, to_json
from pipeload.bench.table import table
from pipeload.cli.options import Directory, in_folder, read_sizes
from pipeload.cli.progress import progress_bars
from pipeload.cli.terminal import say
from pipeload.errors import ConfigError
from pipeload.format.manifest import Manifest, read
from pipeload.machine.sizes import parse_bytes
from pipeload_export.extra import require_modules

__all__ = ["bench"]

Parsed = TypeVar("Parsed")

_WIDTH = 160
_DEFAULT = "pipeload,single,mmap,layerwise,standard"


def bench(
    directory: Directory,
    budgets: Annotated[
        str,
        typer.Option(
            metavar="SIZES", help="Memory limits: sizes such as 512MB, percents of the weights, or none; with commas."
        ),
    ] = "25%,50%,75%",
    disk: Annotated[
        str, typer.Option(metavar="RATES", help="Throttle of the disk, such as 400MB/s, or none; several with commas.")
    ] = "none",
    contenders: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            show_default=_DEFAULT.replace(",", ", "),
            help=f"Whom to compare, with commas; of {', '.join(CONTENDERS)}.",
        ),
    ] = _DEFAULT,
    passes: Annotated[int, typer.Option(min=1, help="Steady passes of each run.")] = 5,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Run everything N times, in turns.")] = 1,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="NAME=N", help="Size of a dimension of the inputs; once for each."),
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The unsplit model; else the shards are joined (needs onnx).",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Intra-op threads of every contender.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as a JSON list.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", callback=in_folder, help="Save everything as JSON.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw pictures there (needs matplotlib).")
    ] = None,
) -> None:
    """Compare pipeload with other ways to run a model, under the same memory and disk limits.

    Each run has a process and, where you may make one (as root), a cgroup of its own, and begins with cold files. Every
    answer is compared with that of one onnxruntime session without limits. `first` is from opening the model to its
    first answer, `steady` the median of later passes (for a decoder: tokens), T* what disk and cores allow at most.

    Examples:
        pipeload bench models/exported/bert-large --budgets 25%,50%,512MB --disk 400MB/s

        pipeload bench models/exported/gpt2-xl --contenders pipeload,mmap --budgets 2GB --json
    """
    manifest = read(directory)
    chosen = _names(contenders)
    caps = tuple(_each(budgets, "--budgets", lambda text: _budget(text, manifest)))
    rates = tuple(_each(disk, "--disk", _rate))
    dims = _sizes(sizes or [], manifest)
    if onnx is not None and not onnx.is_file():
        raise typer.BadParameter(f"There is no file {onnx}. Name the unsplit .onnx file with --onnx.")
    with tempfile.TemporaryDirectory(prefix="pipeload-bench-") as folder, progress_bars() as progress:
        settings = Settings(
            directory=directory,
            unsplit=_unsplit(directory, onnx, Path(folder)),
            contenders=chosen,
            budgets=caps,
            disks=rates,
            passes=passes,
            rounds=rounds,
            sizes=dims,
            threads=threads,
        )
        report = compare(settings, progress, lambda text: say(f"note: {text}", err=True))
    if output:
        report.write(output)
    if pictures:
        for path in draw(report, pictures):
            say(f"{path}", err=True)
    if as_json:
        say(to_json(report.records).decode())
        return
    console = Console()
    # For a file or a pipe, the output is as wide as the table.
    Console(width=console.width if console.is_terminal else _WIDTH).print(table(report.records))
    for record in report.records:
        if record.message:
            say(f"{record.contender}: {record.message}", err=True)


def _unsplit(directory: Path, onnx: Path | None, folder: Path) -> Unsplit:
    if onnx is not None:
        return Unsplit(graph=onnx.resolve(), folder=onnx.resolve().parent)
    require_modules("onnx")
    from pipeload_export.check.merge import merge  # needs onnx

    return Unsplit(graph=merge(directory, folder / "merged.onnx"), folder=directory.resolve())


def _names(text: str) -> tuple[ContenderName, ...]:
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    known: dict[str, ContenderName] = {name: name for name in CONTENDERS}
    if not wanted or (unknown := [name for name in wanted if name not in known]):
        named = f"There is no contender {', '.join(unknown)}." if wanted else "--contenders is empty."
        raise typer.BadParameter(f"{named} The known ones are {', '.join(CONTENDERS)}.")
    return tuple(dict.fromkeys(known[name] for name in wanted))


def _each(text: str, option: str, parse: Callable[[str], Parsed]) -> list[Parsed]:
    """The values of a list with commas, each once."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise typer.BadParameter(f"{option} is empty.")
    return list(dict.fromkeys(parse(part) for part in parts))


def _budget(text: str, manifest: Manifest) -> int | None:
    if text.lower() == "none":
        return None
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        if not float(match[1]):
            raise typer.BadParameter(f"The budget '{text}' must be positive.")
        return int(manifest.weight_bytes * float(match[1]) / 100)
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise typer.BadParameter(f"--budgets takes sizes such as 512MB, or percents of the weights. {error}") from error


def _rate(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not (match := re.fullmatch(r"(.+)/s", text.strip())) or match[1].strip().isdecimal():
        raise typer.BadParameter(
            f"'{text}' is no rate for --disk. Write it with its unit and /s, such as 400MB/s, or none."
        )
    try:
        return parse_bytes(match[1])
    except ConfigError as error:
        raise typer.BadParameter(f"'{text}' is no rate for --disk. {error}") from error


def _sizes(values: list[str], manifest: Manifest) -> dict[str, int]:
    dims = read_sizes(values)
    if unknown := set(dims) - set(manifest.dims):
        raise typer.BadParameter(f"The model has no dimension {sorted(unknown)}; it has {sorted(manifest.dims)}.")
    return dims
