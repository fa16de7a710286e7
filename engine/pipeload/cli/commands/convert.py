"""`pipeload convert`: sharded model directory -> one with smaller weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import pipeload_export
from pipeload.cli.options import Directory, Json
from pipeload.cli.progress import progress_bars
from pipeload.cli.report import accuracy_report, print_json, print_table, summary
from pipeload.cli.rounding import Asymmetric, Keep, MaxError, Mixed
from pipeload.cli.terminal import say

__all__ = ["convert"]


def convert(
    directory: Directory,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The sharded model directory to make.")],
    weights: Annotated[
        pipeload_export.RoundedWeights, typer.Option(help="The bits to which weights are rounded.", show_default=False)
    ],
    block_size: Annotated[pipeload_export.BlockSize, typer.Option(help="Rounded weights that have one scale.")] = "32",
    asymmetric: Asymmetric = False,
    keep: Keep = None,
    mixed: Mixed = None,
    max_error: MaxError = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing sharded model directory.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip all checks, and do not measure what rounding does.")
    ] = False,
    as_json: Json = False,
) -> None:
    r"""Make a copy of a sharded model directory with smaller weights, shard by shard.

    Memory holds about one matrix of the weights. Files that are equal in DIR and OUT are stored once where the file
    system can. Needs the extra \[export].

    Examples:
        pipeload convert models/exported/minilm models/exported/minilm-int8 --weights int8

        pipeload convert gpt gpt-int4 --weights int4 --keep fp32:block.000,epilogue --keep int8:head

        pipeload convert gpt gpt-mixed --weights int4 --mixed 0.5%
    """
    with progress_bars() as progress:
        manifest = pipeload_export.convert(
            directory,
            target,
            weights=weights,
            block_size=int(block_size),
            asymmetric=asymmetric,
            keep=keep or (),
            mixed=mixed,
            max_error=max_error,
            force=force,
            verify=not no_verify,
            progress=progress,
        )
    assert manifest.small_weights is not None
    if as_json:
        print_json({"target": str(target), **summary(manifest), "small_weights": manifest.small_weights})
        return
    print_table(f"{directory} -> {target}", summary(manifest))
    say("with weights of few bits, beside the source in float32:")
    say(accuracy_report(manifest.small_weights))
