"""`pipeload embed`: sentence embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from pipeload.cli.options import Budget, Directory, Json, Stats, Trace, chunks, in_folder, open_model
from pipeload.cli.texts import read_lines, refuse_images
from pipeload.tasks.embed.pooling import normalized

__all__ = ["embed"]

_CHUNK = 256
"""The number of texts per step of the progress bar."""

_FIGURES = 8
"""The number of figures shown of a single vector."""


def embed(
    directory: Directory,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="The texts; - reads lines from stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with one text a line.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=in_folder, help="Save the vectors as .npy.")
    ] = None,
    budget: Budget = "auto",
    as_json: Json = False,
    stats: Stats = False,
    trace: Trace = None,
) -> None:
    """Turn texts into vectors.

    Prints the cosine similarities between the texts, or the first figures of the vector of a single text.

    Examples:
        pipeload embed models/exported/minilm "a cat sleeps" "a kitten naps" --budget 128MB

        pipeload embed models/exported/minilm --file lines.txt --output vectors.npy
    """
    wanted = [line for text in texts or [] for line in (read_lines() if text == "-" else [text])]
    wanted += read_lines(file) if file else []
    if not wanted:
        raise typer.BadParameter("Give at least one TEXT, - for stdin, or --file.")
    refuse_images(texts or [], "embed")
    with open_model(directory, budget, stats=stats, trace=trace) as model:
        parts = [model.embed(list(chunk)) for chunk in chunks(wanted, _CHUNK, "Embedding")]
    vectors = np.concatenate(parts)
    if output:
        with output.open("wb") as target:
            np.save(target, vectors)
    if as_json:
        rows = [{"text": text, "embedding": vector.tolist()} for text, vector in zip(wanted, vectors, strict=True)]
        # In one line: print_json would print one figure per line, thousands of lines.
        typer.echo(json.dumps(rows))
    elif not output:
        typer.echo(_summary(wanted, vectors))


def _summary(texts: list[str], vectors: NDArray[np.float32]) -> str:
    if len(texts) == 1:
        figures = " ".join(f"{figure:.4f}" for figure in vectors[0][:_FIGURES])
        return f"{figures}{' ...' if vectors.shape[1] > _FIGURES else ''}  ({vectors.shape[1]} figures)"
    unit = normalized(vectors)
    lines = [
        " ".join(f"{value:7.3f}" for value in row) + f"  {text}" for row, text in zip(unit @ unit.T, texts, strict=True)
    ]
    return "\n".join(lines)
