"""Files that two directories have in common: one on the disk where the file system allows it, copies elsewhere.

Weights files are never hard links: the package onnx refuses external data with more than one, as a possible attack, and
any ONNX program is to open a shard. Where the file system can (btrfs, xfs), they share their blocks on the disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from pipeload.format.manifest import Manifest
from pipeload.storage.digests import ranges_of

__all__ = ["link_or_copy", "share_equal_files"]

_WEIGHTS = ".safetensors"
_FICLONE = 0x40049409
"""From linux/fs.h: let one file have the blocks of another, until one of them is written to."""


def link_or_copy(source: Path, target: Path) -> None:
    """Make the target, which is not there, the same file as the source, or a copy of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Of a symbolic link, as files of the hub's cache are, what it leads to.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def share_equal_files(source: Path, known: Manifest, target: Path, made: Manifest) -> None:
    """Let files that are equal to some of another directory be stored once.

    Args:
        source: the other directory.
        known: its manifest.
        target: the directory that was made.
        made: its manifest.
    """
    places = {content: source / path for path, content in _contents(known).items()}
    for name, content in _contents(made).items():
        same, path = places.get(content), target / name
        if same is None or same.stat().st_size != path.stat().st_size or path.samefile(same):
            continue
        twin = path.with_name(f"{path.name}.twin")
        try:
            if path.suffix == _WEIGHTS:
                _clone(same, twin)
            else:
                os.link(same.resolve(), twin)
            twin.replace(path)
        except OSError:
            # The file that was written stays.
            twin.unlink(missing_ok=True)


def _clone(source: Path, target: Path) -> None:
    """Make a file of its own, with the blocks on the disk that the source has. Raises OSError where that cannot be."""
    with source.open("rb") as known, target.open("xb") as made:
        fcntl.ioctl(made.fileno(), _FICLONE, known.fileno())


def _contents(manifest: Manifest) -> dict[str, tuple[object, ...]]:
    """Path of each file -> what its bytes are: a weights file's own digest leaves out the ranges of its shards."""
    ranges = ranges_of(manifest)
    return {
        record.path: (
            record.nbytes,
            record.sha256,
            record.ranges_apart,
            *sorted((span.offset, span.nbytes, span.sha256) for span in ranges.get(record.path, ())),
        )
        for record in manifest.files
    }
