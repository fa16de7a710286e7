"""What the manifest's digest of a file has to be, from the file's bytes and by the rule of docs/format.md."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pipeload.format.manifest import FileRecord, Shard

__all__ = ["expected_record"]


def expected_record(directory: Path, path: str, shards: Iterable[Shard], *, apart: bool) -> FileRecord:
    """The record of a file; `apart`: without the bytes that are in a shard's range."""
    data = (directory / path).read_bytes()
    beside = bytearray(b"\1" * len(data))
    for shard in shards:
        if apart and shard.weights and shard.weights.path == path:
            begin, end = shard.weights.offset, shard.weights.offset + shard.weights.nbytes
            beside[begin:end] = bytes(end - begin)
    hashed = bytes(byte for byte, counts in zip(data, beside, strict=True) if counts)
    return FileRecord(path=path, nbytes=len(data), sha256=hashlib.sha256(hashed).hexdigest(), ranges_apart=apart)
