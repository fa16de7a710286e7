"""Files that two directories have in common: hard links where the file system allows them, copies elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pipeload.format.manifest import FileRecord

__all__ = ["link_or_copy", "share_equal_files"]


def link_or_copy(source: Path, target: Path) -> None:
    """Make the target, which is not there, the same file as the source, or a copy of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Of a symbolic link, as files of the hub's cache are, what it leads to.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def share_equal_files(source: Path, known: Iterable[FileRecord], target: Path, made: Iterable[FileRecord]) -> None:
    """Put links in the place of files that are equal to some of another directory.

    Args:
        source: the other directory.
        known: its files.
        target: the directory that was made.
        made: its files.
    """
    places = {(record.nbytes, record.sha256): source / record.path for record in known}
    for record in made:
        same, path = places.get((record.nbytes, record.sha256)), target / record.path
        if same is None or same.stat().st_size != record.nbytes or path.samefile(same):
            continue
        link = path.with_name(f"{path.name}.link")
        with suppress(OSError):
            os.link(same.resolve(), link)
            link.replace(path)
