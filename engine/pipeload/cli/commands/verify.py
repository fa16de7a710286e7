"""`pipeload verify`: is a sharded model directory whole, and are its answers right?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import pipeload_export
from pipeload.cli.options import Directory, Json
from pipeload.cli.progress import progress_bars
from pipeload.cli.report import differences, parity_report, print_json
from pipeload.cli.terminal import say
from pipeload.machine.sizes import format_bytes

__all__ = ["verify"]


def verify(
    directory: Directory,
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL.ONNX", help="The unsplit model, to compare the answers with.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="The checkpoint that it was made from, to compare the answers with."),
    ] = None,
    as_json: Json = False,
) -> None:
    r"""Check the files, graphs and answers of a sharded model directory.

    Sizes, hashes, headers, and that plain onnxruntime opens every shard. With the extra \[export] also onnx.checker,
    with --against a comparison with the unsplit model on inputs of several sizes, and with --source one of the streamed
    model with the checkpoint's own in transformers.

    Examples:
        pipeload verify models/exported/minilm

        pipeload verify models/exported/minilm --against minilm-onnx/model.onnx

        pipeload verify models/exported/minilm --source ./all-MiniLM-L6-v2
    """
    with progress_bars() as progress:
        report = pipeload_export.verify(directory, against, progress, source=source)
    if as_json:
        print_json({"directory": str(directory), "report": report})
        return
    say(f"{directory}: {report.shards} shards, {report.files} files, {format_bytes(report.nbytes)}")
    for check in report.checks:
        say(f"  ok       {check}")
    for skipped in report.skipped:
        say(f"  skipped  {skipped}")
    if report.differences:
        say(f"worst differences over {len(report.cases)} inputs ({'; '.join(report.cases)}):")
        say(differences(report.differences))
    if report.parity:
        say("compared with the source:")
        say(parity_report(report.parity))
