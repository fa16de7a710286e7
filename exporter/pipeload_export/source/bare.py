"""A folder without a graph, as the engine's tasks read the files of a model directory."""

from __future__ import annotations

from pathlib import Path

from pipeload.format.manifest import Manifest
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.runner import FilesOnly

__all__ = ["files_only"]


def files_only(folder: Path, task: str = "") -> FilesOnly:
    """The files of a folder; no manifest lists them.

    Args:
        folder: where they lie.
        task: the task that the manifest would name.
    """
    manifest = Manifest(
        exporter="",
        source="",
        model_type="",
        task=task,
        inputs=(),
        outputs=(),
        edges=(),
        shards=(),
        structures={},
        files=(),
    )
    return FilesOnly(folder, manifest, ModelFiles(folder, manifest))
