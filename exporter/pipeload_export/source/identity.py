"""What an export is made of: two exports of one identity write the same files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

import pipeload
from pipeload_export.source.sources import Checkpoint, Unsplit

__all__ = ["facts_of", "identity_of"]

_LIBRARIES = ("numpy", "onnx", "onnxruntime", "optimum", "optimum-onnx", "torch", "transformers")


def identity_of(facts: Mapping[str, Any]) -> str:
    """A digest of what an export is made of and how, and of the versions of the libraries."""
    versions = {"pipeload": pipeload.__version__, **dict(_versions())}
    return hashlib.sha256(msgspec.json.encode({**facts, "versions": versions}, order="sorted")).hexdigest()


def facts_of(found: Checkpoint | Unsplit) -> dict[str, Any]:
    """The source, and its files by name, size and time."""
    files = _checkpoint_files(found) if isinstance(found, Checkpoint) else found.files
    return {
        "source": found.source,
        "request": found.request if isinstance(found, Checkpoint) else None,
        "files": [(str(file), (of := file.stat()).st_size, of.st_mtime_ns) for file in sorted(files)],
    }


def _checkpoint_files(found: Checkpoint) -> list[Path]:
    folder = found.request.folder
    # A target in the checkpoint's folder has hidden files there while it is made.
    return [path for path in Path(folder).glob("[!.]*") if path.is_file()] if folder else []


def _versions() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, ""
