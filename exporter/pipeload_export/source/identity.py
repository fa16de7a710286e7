"""What an export is made of: two exports of one identity write the same files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

import pipeload
from pipeload_export.source.sources import Checkpoint, Unsplit

__all__ = ["identity_of"]

_LIBRARIES = ("numpy", "onnx", "onnxruntime", "optimum", "optimum-onnx", "torch", "transformers")


def identity_of(found: Checkpoint | Unsplit, options: Sequence[str | int | bool]) -> str:
    """A digest of the source (its files by name, size and time), the options, and the versions of the libraries."""
    files = _checkpoint_files(found) if isinstance(found, Checkpoint) else found.files
    facts = {
        "source": found.source,
        "request": found.request if isinstance(found, Checkpoint) else None,
        "files": [(str(file), (of := file.stat()).st_size, of.st_mtime_ns) for file in sorted(files)],
        "options": options,
        "versions": {"pipeload": pipeload.__version__, **dict(_versions())},
    }
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()


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
