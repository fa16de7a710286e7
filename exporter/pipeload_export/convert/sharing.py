"""Files that two directories have in common: hard links where the file system allows them, copies elsewhere."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from pipeload.format.manifest import Manifest
from pipeload.storage.digests import ranges_of

__all__ = ["link_or_copy", "share_equal_files"]


def link_or_copy(source: Path, target: Path) -> None:
    """Make the target, which is not there, the same file as the source, or a copy of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Of a symbolic link, as files of the hub's cache are, what it leads to.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def share_equal_files(source: Path, known: Manifest, target: Path, made: Manifest) -> None:
    """Put links in the place of files that are equal to some of another directory.

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
        link = path.with_name(f"{path.name}.link")
        with suppress(OSError):
            os.link(same.resolve(), link)
            link.replace(path)


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
