"""A copy with fewer bits, put beside the model that it guesses tokens for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pipeload.errors import ConfigError
from pipeload.format.manifest import MANIFEST_NAME, Draft, Manifest, write
from pipeload.notify import Notify
from pipeload_export.build import record_of
from pipeload_export.convert.convert import write_rounded
from pipeload_export.convert.how import How, how_to_round
from pipeload_export.staging import Staging
from pipeload_export.write.journal import Journal

__all__ = ["DraftWeights", "add_draft", "how_to_draft", "no_draft"]

DraftWeights = Literal["int4"]
"""Weights of a copy of the model that guesses its tokens."""

_FOLDER = "draft"
_BLOCK_SIZE = 128
"""Fewer scales: with 32 weights to one, packed sessions of SmolLM2 take a fifth more memory, and guess 3 % better."""
_FILES = ("config.json",)
"""Of the files beside the model: the draft's tokens are the model's, which has the tokenizer."""


def add_draft(
    manifest: Manifest,
    staging: Staging,
    floats: Path,
    draft: DraftWeights,
    progress: Notify,
    *,
    journal: Journal,
    verify: bool,
) -> Manifest:
    """Write a rounded copy into the folder of the draft. Returns the model's manifest, which lists the copy's.

    Args:
        manifest: the model's.
        staging: its folder; the model is complete.
        floats: the sharded model directory that is rounded.
        draft: the weights of the copy.
        progress: called with the name of the step, the part done, and the whole.
        journal: of finished weights files; those of killed exports are taken from it.
        verify: check the copy, and measure what rounding does.
    """
    folder = staging.result / _FOLDER
    folder.mkdir()
    how = how_to_draft(draft, verify=verify)
    made = write_rounded(floats, folder, staging.work, how, progress, journal=journal, verify=verify)
    for record in made.files:
        if not record.path.startswith("shards/") and record.path not in _FILES:
            (folder / record.path).unlink()
    made = replace(made, files=tuple(record for record in made.files if (folder / record.path).exists()))
    write(made, folder)
    accuracy = made.small_weights.accuracy if made.small_weights else None
    told = Draft(path=_FOLDER, nbytes=made.weight_bytes, top1=accuracy.top1 if accuracy else None)
    files = (*manifest.files, record_of(staging.result, f"{_FOLDER}/{MANIFEST_NAME}"))
    manifest = replace(manifest, files=files, draft=told)
    write(manifest, staging.result)
    return manifest


def how_to_draft(draft: DraftWeights, *, verify: bool) -> How:
    """How the weights of a draft are rounded."""
    how = how_to_round(
        draft, block_size=_BLOCK_SIZE, asymmetric=False, keep=(), mixed=None, max_error=None, verify=verify
    )
    assert how is not None
    return how


def no_draft(task: str) -> ConfigError:
    """The error for a model of another task."""
    return ConfigError(
        f"A draft guesses tokens for a model that generates text with KV caches, and this one is for {task}. Leave "
        "--draft out, or export the model with --task text-generation-with-past."
    )
