"""`pipeload export`: SOURCE -> sharded model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import pipeload_export
from pipeload.cli.loudness import show_libraries
from pipeload.cli.options import Json
from pipeload.cli.progress import progress_bars
from pipeload.cli.report import accuracy_report, differences, parity_report, print_json, print_table, summary
from pipeload.cli.rounding import Asymmetric, Keep, MaxError, Mixed
from pipeload.cli.terminal import say

__all__ = ["export"]


def export(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Hub id, checkpoint folder, .gguf file, .onnx file, or catalog:NAME."),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The sharded model directory to make.")],
    task: Annotated[
        str | None, typer.Option(help="What the model is for, such as text-classification; else as its config says.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    opset: Annotated[int | None, typer.Option(min=1, help="Version of the ONNX operators, at most 20.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Make one shard of a model without repeating blocks.")] = False,
    weights: Annotated[
        pipeload_export.Weights,
        typer.Option(
            help="Weights in 16 bits where that loses nothing, and in a GGUF file's own blocks; as they are; or "
            "rounded to 16, 8 or 4 bits."
        ),
    ] = "auto",
    kv_cache: Annotated[
        pipeload_export.KvCache,
        typer.Option(help="KV caches as the model has them, or rounded to int8: a quarter of the memory."),
    ] = "model",
    block_size: Annotated[pipeload_export.BlockSize, typer.Option(help="Rounded weights that have one scale.")] = "32",
    asymmetric: Asymmetric = False,
    keep: Keep = None,
    mixed: Mixed = None,
    draft: Annotated[
        pipeload_export.DraftWeights | None,
        typer.Option(help="Put a copy with weights of few bits beside a decoder, which guesses its tokens."),
    ] = None,
    max_error: MaxError = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing sharded model directory.")] = False,
    keep_onnx: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the unsplit ONNX model in this folder.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that the checkpoint brings along.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Put random numbers where the checkpoint lacks weights.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip all checks and comparisons: the answers may be wrong.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the libraries print.")] = False,
    as_json: Json = False,
) -> None:
    r"""Make a sharded model directory of a checkpoint or an ONNX file.

    It appears at TARGET when it is complete and verified, or not at all. Needs the extra \[export].

    Examples:
        pipeload export catalog:minilm models/exported/minilm

        pipeload export sentence-transformers/all-MiniLM-L6-v2 minilm --revision main

        pipeload export ./checkpoint classifier --task text-classification

        pipeload export ./gpt-checkpoint gpt --kv-cache int8

        pipeload export catalog:smollm2-135m smollm2-int8 --weights int8

        pipeload export ./model.onnx small --weights int4 --mixed 0.5%

        pipeload export ./gpt-checkpoint gpt --draft int4

        pipeload export ./model.onnx model --force --json
    """
    if verbose:
        show_libraries()
    with progress_bars() as progress:
        manifest = pipeload_export.export(
            source,
            target,
            task=task,
            revision=revision,
            opset=opset,
            whole=whole,
            weights=weights,
            kv_cache=kv_cache,
            block_size=int(block_size),
            asymmetric=asymmetric,
            keep=keep or (),
            mixed=mixed,
            draft=draft,
            max_error=max_error,
            force=force,
            trust_remote_code=trust_remote_code,
            allow_missing=allow_missing,
            keep_onnx=keep_onnx,
            verify=not no_verify,
            progress=progress,
        )
    if as_json:
        facts: dict[str, Any] = {"verification": manifest.verification, "parity": manifest.parity}
        facts |= {"small_weights": manifest.small_weights} if manifest.small_weights else {}
        print_json({"target": str(target), **summary(manifest), **facts})
        return
    print_table(f"{manifest.source} -> {target}", summary(manifest))
    say(differences(manifest.verification))
    if manifest.small_weights:
        say("with weights of few bits, beside the source in float32:")
        say(accuracy_report(manifest.small_weights))
    if manifest.parity:
        say("streamed by the engine and compared with the source:")
        say(parity_report(manifest.parity))
