"""Decoders with a draft of their own, from two toys: the model's directory lists the other one as its draft."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from tests.engine.toy import make_toy

from pipeload.format.manifest import MANIFEST_NAME, Draft, FileRecord, read, write

__all__ = ["make_drafted"]


def make_drafted(directory: Path, *, width: int = 1024, top1: float | None = 0.9) -> Path:
    """A decoder of 8 blocks, whose draft has its first one: often of its opinion."""
    make_toy(directory, blocks=8, width=width, decoder=True)
    make_toy(directory / "draft", blocks=1, width=width, decoder=True)
    files = []
    for path in sorted((directory / "draft").rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            name = path.relative_to(directory).as_posix()
            files.append(FileRecord(path=name, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    nbytes = read(directory / "draft").weight_bytes
    manifest = read(directory)
    write(
        replace(manifest, files=(*manifest.files, *files), draft=Draft(path="draft", nbytes=nbytes, top1=top1)),
        directory,
    )
    assert (directory / MANIFEST_NAME).is_file()
    return directory
