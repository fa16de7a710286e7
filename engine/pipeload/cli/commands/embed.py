"""`pipeload embed`: sentence embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from pipeload.cli.options import Budget, Directory, Json, JsonLines, Stats, Trace, chunks, in_folder, open_model
from pipeload.cli.terminal import say
from pipeload.cli.texts import argued_texts, refuse_images
from pipeload.tasks.embed.pooling import normalized

__all__ = ["embed"]

_CHUNK = 256
"""The number of texts per step of the progress bar."""

_FIGURES = 8
"""The number of figures shown of a single vector."""

_MOST_COMPARED = 12
"""The most texts whose similarities are shown: more do not fit into a line."""


def _vectors_file(path: Path | None) -> Path | None:
    path = in_folder(path)
    if path is not None and path.suffix.lower() not in ("", ".npy", ".csv"):
        raise typer.BadParameter(f"{path} is neither .npy nor .csv. Name one of them, or print with --json or --jsonl.")
    return path


def embed(
    directory: Directory,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="The texts; - reads lines from stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with one text a line.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=_vectors_file, help="Save the vectors as .npy, or as .csv, one a line."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Put this before each text, such as 'query: ' for E5.")
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Put the model's own prompt of this name before each text.")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Bring each vector to length 1.")] = False,
    truncate_dim: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Keep the first N figures of each vector.")
    ] = None,
    budget: Budget = "auto",
    as_json: Json = False,
    json_lines: JsonLines = False,
    stats: Stats = False,
    trace: Trace = None,
) -> None:
    """Turn texts into vectors.

    Prints the cosine similarities between the texts, or the first figures of the vector of a single text.

    Examples:
        pipeload embed models/exported/minilm "a cat sleeps" "a kitten naps" --budget 128MB

        pipeload embed models/exported/minilm --file lines.txt --output vectors.npy

        pipeload embed models/exported/e5 "how to cook rice" --prompt "query: " --jsonl
    """
    wanted = argued_texts(texts, file, "TEXT")
    refuse_images(texts or [], "embed")
    parts = []
    with open_model(directory, budget, stats=stats, trace=trace) as model:
        for chunk in chunks(wanted, _CHUNK, "Embedding"):
            parts.append(
                model.embed(
                    list(chunk),
                    prompt=prompt,
                    prompt_name=prompt_name,
                    normalize=normalize,
                    truncate_dim=truncate_dim,
                )
            )
            if json_lines:
                for row in _rows(chunk, parts[-1]):
                    say(json.dumps(row))
    vectors = np.concatenate(parts)
    if output:
        _save(output, vectors)
    if as_json:
        # In one line: print_json would print one figure per line, thousands of lines.
        say(json.dumps(_rows(wanted, vectors)))
    elif not (output or json_lines):
        say(_summary(wanted, vectors))


def _rows(texts: Sequence[str], vectors: NDArray[np.float32]) -> list[dict[str, object]]:
    return [{"text": text, "embedding": vector.tolist()} for text, vector in zip(texts, vectors, strict=True)]


def _save(path: Path, vectors: NDArray[np.float32]) -> None:
    with path.open("wb") as target:
        if path.suffix.lower() == ".csv":
            # Nine figures give a float32 back exactly.
            np.savetxt(target, vectors, fmt="%.9g", delimiter=",")
        else:
            np.save(target, vectors)


def _summary(texts: list[str], vectors: NDArray[np.float32]) -> str:
    if len(texts) == 1:
        figures = " ".join(f"{figure:.4f}" for figure in vectors[0][:_FIGURES])
        return f"{figures}{' ...' if vectors.shape[1] > _FIGURES else ''}  ({vectors.shape[1]} figures)"
    if len(texts) > _MOST_COMPARED:
        count, width = vectors.shape
        return f"{count} vectors of {width} figures. --output FILE saves them, --jsonl prints them."
    unit = normalized(vectors)
    lines = [
        " ".join(f"{value:7.3f}" for value in row) + f"  {text}" for row, text in zip(unit @ unit.T, texts, strict=True)
    ]
    return "\n".join(lines)
