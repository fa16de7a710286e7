"""Shard files -> page-aligned buffers. The only module that opens weights.

A weights file is a safetensors file whose data begins at a multiple of 4096 bytes. A shard's weights are one
contiguous range of it, read in large pieces by direct I/O, so that no page cache is filled and no byte is copied
twice; file systems without O_DIRECT get ordinary reads, each piece followed by `POSIX_FADV_DONTNEED`.

Files are opened for each load and closed after it: a file that went missing, shrank or was replaced is noticed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import LoadError, ShardError
from pipeload.format.manifest import PAGE_BYTES, FileRecord, Lookup, Manifest, Shard, WeightSpec
from pipeload.format.pages import page_ceil, page_floor
from pipeload.format.safetensors import check_header
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.stamps import Stamp, Stamps, stamp

__all__ = ["Storage"]

_PIECE_BYTES, _MOST_PIECE_BYTES = 8 << 20, 64 << 20
"""The first read of a load, and the largest: between two reads the disk waits for a processor."""
_PIECE_S = 0.1
"""A read is so large that it takes about so long: a cancelled load ends soon."""
_CHECK_BYTES = 1 << 20
"""One read of a check: small, since the budget has no place for it."""
_MAX_HEADER_BYTES = 100 << 20


class Storage:
    """The files of one sharded model directory.

    Args:
        directory: the sharded model directory.
        manifest: its validated manifest.
        verify: check the sha256 of a file or range when it is read, unless it has a stamp.
        stamps: what was checked before; None remembers only what this storage checked.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, *, verify: bool = True, stamps: Stamps | None = None
    ) -> None:
        self._directory = directory.resolve()
        self._records = {record.path: record for record in manifest.files}
        self._verify = verify
        self._stamps = stamps if stamps is not None else Stamps(None)
        self._implied: set[str] = set()
        self._headers: dict[str, bytes] = {}
        self._tensors: dict[str, list[WeightSpec]] = {}
        self._slices: dict[str, list[WeightSpec]] = {}
        for shard in manifest.shards:
            if shard.weights:
                expected = self._slices if shard.role == "head" else self._tensors
                expected.setdefault(shard.weights.path, []).extend(shard.tensors)
        tables: dict[str, dict[str, int]] = {}
        for shard in manifest.shards:
            for lookup in shard.lookups:
                self._tensors.setdefault(lookup.path, []).append(lookup.table)
                tables.setdefault(lookup.path, {})[lookup.table.name] = lookup.table.nbytes
        for path, sizes in tables.items():
            # Slices of a tied head that are all of the file are checked before the pass has an answer.
            if sum(spec.nbytes for spec in self._slices.get(path, [])) >= sum(sizes.values()):
                self._implied.add(path)

    def graph(self, shard: Shard) -> Path:
        """The shard's graph file, checked.

        Raises:
            ShardError: it is missing, or not the file that was exported.
        """
        path, record = self._resolve(shard.graph.path), shard.graph
        try:
            if path.stat().st_size != record.nbytes:
                raise ShardError(_wrong_size(record, path.stat().st_size))
            if self._must_verify(record.path, path):
                before = stamp(path)
                if hashlib.sha256(path.read_bytes()).hexdigest() != record.sha256:
                    raise ShardError(_damaged(record.path))
                self._stamps.add(record.path, path, before)
        except OSError as error:
            raise _unreadable(record.path, error) from error
        return path

    def read_weights(
        self, shard: Shard, parts: Sequence[Part], cancelled: Callable[[], bool], *, direct: bool = True
    ) -> bool:
        """Fill the parts with their bytes of the shard's weights. Returns False when `cancelled` became true meanwhile.

        The sha256 is checked when the parts are all of the shard.

        Args:
            shard: what to read.
            parts: where to; in the order of the file.
            cancelled: looked at between pieces.
            direct: read past the page cache where the file system can.

        Raises:
            ShardError: the file is missing, truncated, damaged or foreign.
            LoadError: the system could not read it.
        """
        if shard.weights is None:
            return True
        span = shard.weights
        path = self._resolve(span.path)
        self._check_header(path, self._records[span.path])
        key = f"{span.path}@{span.offset}"
        whole = sum(part.end - part.begin for part in parts) == span.nbytes
        before = _stamp(path, span.path)
        digest = hashlib.sha256() if whole and self._must_verify(key, path) else None
        for part in parts:
            begin = page_floor(part.begin)
            skip = part.begin - begin
            pieces = self._read_pieces(
                span.path,
                path,
                span.offset + begin,
                part.end - begin,
                part.buffer.piece,
                _PIECE_BYTES,
                most_bytes=_MOST_PIECE_BYTES,
                direct=direct,
            )
            if cancelled():
                return False
            for piece in pieces:
                if cancelled():
                    return False
                if digest:
                    digest.update(piece[skip:])
                # A short read may end before the part begins.
                skip = max(0, skip - len(piece))
        if digest:
            if digest.hexdigest() != span.sha256:
                raise ShardError(_damaged(span.path))
            self._stamps.add(key, path, before)
        return True

    def save_stamps(self) -> None:
        """Remember for later processes what was checked."""
        self._stamps.save()

    def forget_cached(self, shard: Shard) -> None:
        """Drop the shard's weights from the page cache, where they are no longer of use."""
        if shard.weights is None or not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError):
            descriptor = os.open(self._resolve(shard.weights.path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, shard.weights.offset, shard.weights.nbytes, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def stream_weights(self, shard: Shard, scratch: Buffer, *, direct: bool = True) -> Iterator[int]:
        """Read the shard's weights without keeping them: each read fills `scratch` and replaces the one before.

        Args:
            shard: what to read.
            scratch: where to.
            direct: past the page cache, where the file system can; else through it.

        Yields:
            Bytes of each read.

        Raises:
            ShardError: the file is missing, truncated or foreign. Its sha256 is not checked.
            LoadError: the system could not read it.
        """
        if shard.weights is None:
            return
        span = shard.weights
        path = self._resolve(span.path)
        self._check_header(path, self._records[span.path])
        place = lambda begin, end: scratch.piece(0, end - begin)  # noqa: E731
        for piece in self._read_pieces(span.path, path, span.offset, span.nbytes, place, scratch.nbytes, direct=direct):
            yield len(piece)
            piece.release()

    def read_rows(self, lookup: Lookup, indices: NDArray[Any], *, keep_cached: bool) -> NDArray[Any]:
        """Rows of a table: the same as `table[indices]`, with only those rows read.

        The first time, all of the table's file is read once to check its sha256, unless a tied head is checked anyway.

        Args:
            lookup: the table and its file.
            indices: integers of any shape; negative ones count from the end.
            keep_cached: leave the rows in the page cache for the next call.

        Returns:
            Array of shape `indices.shape + table.shape[1:]`; bfloat16 appears as uint16.

        Raises:
            ShardError: the file is missing, truncated, damaged or foreign.
            IndexError: an index is not below the number of rows.
        """
        table = lookup.table
        path, record = self._resolve(lookup.path), self._records[lookup.path]
        self._check_header(path, record)
        self._verify_once(lookup.path, path, record.nbytes, record.sha256)
        rows, inverse = np.unique(indices, return_inverse=True)
        if rows.size and not (-table.shape[0] <= rows[0] and rows[-1] < table.shape[0]):
            worst = int(rows[0] if rows[0] < -table.shape[0] else rows[-1])
            raise IndexError(f"{worst} is no row of '{table.name}', which has {table.shape[0]}")
        dtype = np.dtype(np.uint16 if table.dtype == "bfloat16" else table.dtype)
        unique = np.empty((rows.size, *table.shape[1:]), dtype)
        row_bytes = dtype.itemsize * prod(table.shape[1:])
        flat = unique.view(np.uint8).reshape(-1).data if unique.size else memoryview(b"")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, table.offset, table.nbytes, os.POSIX_FADV_RANDOM)
                for place, row in enumerate((rows % table.shape[0]).tolist() if rows.size else []):
                    piece = flat[place * row_bytes : (place + 1) * row_bytes]
                    if os.preadv(descriptor, [piece], table.offset + row * row_bytes) != row_bytes:
                        raise ShardError(_wrong_size(record, os.fstat(descriptor).st_size))
                if not keep_cached and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, table.offset, table.nbytes, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unreadable(lookup.path, error) from error
        result: NDArray[Any] = unique[inverse.reshape(indices.shape)]
        return result

    def _read_pieces(
        self,
        name: str,
        path: Path,
        offset: int,
        nbytes: int,
        place: Callable[[int, int], memoryview],
        piece_bytes: int,
        *,
        most_bytes: int = 0,
        direct: bool = True,
    ) -> Iterator[memoryview]:
        """Read a range, piece by piece, and leave nothing of it in the page cache.

        Args:
            name: the file, as the manifest names it.
            path: where it is.
            offset: where the range begins, a multiple of the page size.
            nbytes: its length.
            place: (begin, end) within the range -> page-aligned memory for these bytes.
            piece_bytes: bytes of one read.
            most_bytes: reads may become so large where they are fast.
            direct: past the page cache where the file system can.

        Yields:
            What each read brought, without what lies behind the range.
        """
        descriptor, direct = _open(path, name, direct=direct)
        try:
            position = 0
            while position < nbytes:
                end = min(position + piece_bytes, page_ceil(nbytes))
                target = place(position, end)
                begin_s = time.perf_counter()
                try:
                    count = os.preadv(descriptor, [target], offset + position)
                except OSError as error:
                    if not (direct and error.errno == errno.EINVAL):
                        raise LoadError(
                            f"Reading '{name}' at byte {offset + position} failed: {error.strerror}. "
                            "Check the disk, then load the model again."
                        ) from error
                    descriptor, direct = _reopen(descriptor, path, name), False
                    continue
                if count == 0:
                    raise ShardError(_wrong_size(self._records[name], offset + position))
                if not direct and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, offset + position, count, os.POSIX_FADV_DONTNEED)
                in_time = int(count * _PIECE_S / max(time.perf_counter() - begin_s, 1e-9))
                piece_bytes = max(piece_bytes, page_floor(min(in_time, most_bytes)))
                yield target[: min(count, nbytes - position)]
                position += count
                if direct and position < nbytes and position % PAGE_BYTES:
                    # Direct I/O cannot go on from an unaligned place: ordinary reads can, or meet the end of the file.
                    descriptor, direct = _reopen(descriptor, path, name), False
        finally:
            os.close(descriptor)

    def _verify_once(self, key: str, path: Path, nbytes: int, sha256: str) -> None:
        """Compare the first bytes of a file with their sha256, unless that was done before or is not wanted."""
        if not self._must_verify(key, path):
            return
        name, digest, before = path.relative_to(self._directory).as_posix(), hashlib.sha256(), _stamp(path, key)
        scratch = Buffer(_CHECK_BYTES)
        place = lambda begin, end: scratch.piece(0, end - begin)  # noqa: E731
        for piece in self._read_pieces(name, path, 0, nbytes, place, _CHECK_BYTES):
            digest.update(piece)
            piece.release()
        scratch.close()
        if digest.hexdigest() != sha256:
            raise ShardError(_damaged(name))
        self._stamps.add(key, path, before)

    def _must_verify(self, key: str, path: Path) -> bool:
        return self._verify and key not in self._implied and not self._stamps.has(key, path)

    def _resolve(self, relative: str) -> Path:
        """The file's path, which must not leave the model directory, not even through a symbolic link."""
        path = (self._directory / relative).resolve()
        if self._directory not in path.parents:
            raise ShardError(f"'{relative}' leads out of the model directory, to {path}. Export the model again.")
        return path

    def _check_header(self, path: Path, record: FileRecord) -> None:
        """Size at each load; the header is parsed once and compared as bytes from then on."""
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != record.nbytes:
                    raise ShardError(_wrong_size(record, size))
                known = self._headers.get(record.path)
                if known is not None:
                    if file.read(len(known)) != known:
                        raise ShardError(_damaged(record.path))
                    return
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                    raise ShardError(
                        f"'{record.path}' is no safetensors file: its header claims {length} bytes. "
                        "Copy or export the model again."
                    )
                header = file.read(length)
        except OSError as error:
            raise _unreadable(record.path, error) from error
        tensors, slices = self._tensors.get(record.path, []), self._slices.get(record.path, [])
        check_header(record.path, header, tensors, slices)
        self._headers[record.path] = length.to_bytes(8, "little") + header


def _open(path: Path, name: str, *, direct: bool) -> tuple[int, bool]:
    """(descriptor, whether it is for direct I/O)."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        if direct and hasattr(os, "O_DIRECT"):
            with suppress(OSError):
                return os.open(path, flags | os.O_DIRECT), True
        return os.open(path, flags), False
    except OSError as error:
        raise _unreadable(name, error) from error


def _reopen(descriptor: int, path: Path, name: str) -> int:
    """A descriptor of the same file for ordinary reads, in place of the one for direct I/O."""
    try:
        ordinary = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(name, error) from error
    os.close(descriptor)
    return ordinary


def _stamp(path: Path, name: str) -> Stamp:
    try:
        return stamp(path)
    except OSError as error:
        raise _unreadable(name, error) from error


def _wrong_size(record: FileRecord, size: int) -> str:
    return f"'{record.path}' has {size} bytes, the manifest says {record.nbytes}. Copy or export the model again."


def _damaged(name: str) -> str:
    return f"'{name}' is damaged: its sha256 is not the one in the manifest. Copy or export the model again."


def _unreadable(name: str, error: OSError) -> ShardError:
    return ShardError(f"'{name}' cannot be read: {error.strerror or error}. Copy or export the model again.")
