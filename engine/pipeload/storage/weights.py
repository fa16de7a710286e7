"""Shard files -> page-aligned buffers. The only module that opens weights.

A weights file is a safetensors file whose data begins at a multiple of 4096 bytes. A shard's weights are one
contiguous range of it.

Each load opens its files and closes them. Checks (size, header, stamp) and reads both use the open file, so nothing can
take its place in between. A load uses bytes only if they were hashed on their way into memory, or if the file's stamp,
before and after reading, is one under which all of the range was found right.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ShardError
from pipeload.format.casts import without_casts
from pipeload.format.graph_sizes import check_sizes
from pipeload.format.graphs import check_graph
from pipeload.format.manifest import FileRecord, Lookup, Manifest, Shard, WeightSpec, WeightsRange
from pipeload.format.pages import page_floor
from pipeload.format.safetensors import check_header, most_header_bytes
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.digests import FileDigests, ranges_of
from pipeload.storage.model_files import ModelFiles, unreadable
from pipeload.storage.ranges import OpenFile, read_bytes, read_into, read_range, set_direct, wrong_size
from pipeload.storage.stamps import Stamp, Stamps, is_fresh, stamp_of
from pipeload.storage.tied import TiedTable
from pipeload.storage.widening import widened

__all__ = ["GraphFile", "Storage"]

_PIECE_BYTES, _MOST_PIECE_BYTES = 8 << 20, 64 << 20
"""The first read of a load, and the largest: between two reads the disk waits for a processor."""
_CHECK_BYTES = 1 << 20
"""One read of a check: small, since the budget has no place for it."""
_MOST_GRAPH_BYTES = 16 << 20
_ROW_ATTEMPTS = 3
"""A file that changes while its rows are read is opened at most this many times."""


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A shard's graph, as a session is made of it.

    Attributes:
        path: its file; its folder is that of the weights files that it names.
        data: the bytes that were checked; where weights are widened as they are loaded, the graph over widened ones.
    """

    path: Path
    data: bytes


class Storage:
    """The files of one sharded model directory.

    Args:
        directory: the sharded model directory.
        manifest: its validated manifest.
        verify: check the sha256 of a file or range when it is read, unless it has a stamp.
        stamps: the files checked before; None remembers only this storage's own checks.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, *, verify: bool = True, stamps: Stamps | None = None
    ) -> None:
        self._files = ModelFiles(directory, manifest, verify=verify)
        self._manifest = manifest
        self._ranges = ranges_of(manifest)
        self._verify = verify
        self._stamps = stamps if stamps is not None else Stamps(None)
        self._tied: dict[str, TiedTable] = {}
        self._headers: dict[str, bytes] = {}
        self._graphs: dict[str, tuple[Stamp, bytes | None]] = {}
        self._tensors: dict[str, list[WeightSpec]] = {}
        self._slices: dict[str, list[WeightSpec]] = {}
        heads: dict[str, list[str]] = {}
        for shard in manifest.shards:
            if shard.weights:
                expected = self._slices if shard.role == "head" else self._tensors
                expected.setdefault(shard.weights.path, []).extend(shard.tensors)
                if shard.role == "head":
                    heads.setdefault(shard.weights.path, []).append(_key(shard.weights))
        tables: dict[str, dict[str, int]] = {}
        for shard in manifest.shards:
            for lookup in shard.lookups:
                self._tensors.setdefault(lookup.path, []).extend(lookup.parts or (lookup.table,))
                tables.setdefault(lookup.path, {})[lookup.table.name] = lookup.table.nbytes
        for path, sizes in tables.items():
            if sum(spec.nbytes for spec in self._slices.get(path, [])) >= sum(sizes.values()):
                self._tied[path] = TiedTable(path, heads[path])

    def graph(self, shard: Shard) -> GraphFile:
        """The shard's graph, checked: a session is made of these bytes, so that nothing can take their place.

        Raises:
            ShardError: it is missing, or not the file that was exported.
        """
        record = shard.graph
        if record.nbytes > _MOST_GRAPH_BYTES:
            raise ShardError(
                f"'{record.path}' has {record.nbytes} bytes, and a shard's graph has at most {_MOST_GRAPH_BYTES}. "
                "Export the model again."
            )
        with self._open(record) as file:
            path = self._files.path(record.path)
            hashed = not self._verify or self._stamps.has(record.path, file.stamp)
            stamp, widened = self._graphs.get(shard.name, (None, None))
            checked = hashed and stamp == file.stamp
            if checked and widened is not None:
                return GraphFile(path, widened)
            with _named(record.path):
                data = read_bytes(file, record.nbytes, 0)
                unchanged = file.stamp_now() == file.stamp
            if self._verify and not (hashed and unchanged):
                if hashlib.sha256(data).hexdigest() != record.sha256:
                    raise ShardError(_damaged(record.path))
                self._stamps.add(record.path, file.stamp, file.stamp_now())
            if checked and unchanged:
                return GraphFile(path, data)
            check_graph(shard, data)
            widened = without_casts(shard, data)
            # A stamp is of the file and of the manifest: it holds for all that follows from these two.
            sizes = f"{record.path}: sizes"
            if not (self._verify and unchanged and self._stamps.has(sizes, file.stamp)):
                check_sizes(self._manifest, shard, data if widened is None else widened)
                self._stamps.add(sizes, file.stamp, file.stamp_now())
            self._graphs.pop(shard.name, None)
            if unchanged and not is_fresh(file.stamp):
                self._graphs[shard.name] = file.stamp, widened
            return GraphFile(path, data if widened is None else widened)

    def read_weights(
        self, shard: Shard, parts: Sequence[Part], cancelled: Callable[[], bool], *, direct: bool = True
    ) -> bool:
        """Fill the parts with their bytes of the shard's weights. Returns False when `cancelled` became true meanwhile.

        Where the file is not known to be right, the whole shard is read and hashed, even if the parts do not cover it.

        Args:
            shard: the shard to read.
            parts: the memory to fill; in the order of the file.
            cancelled: called between pieces.
            direct: read past the page cache where the file system can.

        Raises:
            ShardError: the file is missing, truncated, damaged or foreign.
            LoadError: the system could not read it.
        """
        if shard.weights is None:
            return True
        span, key = shard.weights, _key(shard.weights)
        with self._open_weights(span.path) as file:
            known = self._verify and self._stamps.has(key, file.stamp)
            if known or not self._verify:
                if not self._fill(file, span, parts, cancelled, None, direct=direct):
                    return False
                known = known and file.stamp_now() == file.stamp
            if self._verify and not known:
                digest = hashlib.sha256()
                if not self._fill(file, span, _with_gaps(parts, span.nbytes), cancelled, digest, direct=direct):
                    return False
                if digest.hexdigest() != span.sha256:
                    raise ShardError(_damaged(span.path))
                self._stamps.add(key, file.stamp, file.stamp_now())
            if self._verify and shard.role == "head" and span.path in self._tied:
                self._tied[span.path].slice_was_read(key, file.stamp)
        return True

    def save_stamps(self) -> None:
        """Remember the checked files for later processes."""
        self._stamps.save()

    def forget_cached(self, shard: Shard) -> None:
        """Drop the shard's weights from the page cache, where they are no longer of use."""
        if shard.weights is None or not hasattr(os, "posix_fadvise"):
            return
        span = shard.weights
        with suppress(OSError), self._files.open(span.path) as descriptor:
            os.posix_fadvise(descriptor, span.offset, span.nbytes, os.POSIX_FADV_DONTNEED)

    def stream_weights(self, shard: Shard, scratch: Buffer, *, direct: bool = True) -> Iterator[int]:
        """Read the shard's weights without keeping them: each read fills `scratch` and replaces the one before.

        Args:
            shard: the shard to read.
            scratch: the memory that each read fills.
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
        with self._open_weights(span.path) as file:
            place = _over(scratch)
            for piece in read_range(file, span.offset, span.nbytes, place, scratch.nbytes, direct=direct):
                yield len(piece)
                piece.release()

    def read_rows(self, lookup: Lookup, indices: NDArray[Any], *, keep_cached: bool) -> NDArray[Any]:
        """Rows of a table: the same as `table[indices]`, with only those rows read.

        All of the table's file is read first to check its sha256, unless that was done before and the file has not
        changed since, or the slices of a tied head are checked anyway.

        Args:
            lookup: the table and its file.
            indices: integers of any shape; negative ones count from the end.
            keep_cached: leave the rows in the page cache for the next call.

        Returns:
            Array of shape `indices.shape + table.shape[1:]`, float32 for a table that is widened; bfloat16 of any other
            appears as uint16.

        Raises:
            ShardError: the file is missing, truncated, damaged or foreign.
            IndexError: an index is not below the number of rows.
        """
        table = lookup.table
        rows, inverse = np.unique(indices, return_inverse=True)
        if rows.size and not (-table.shape[0] <= rows[0] and rows[-1] < table.shape[0]):
            worst = int(rows[0] if rows[0] < -table.shape[0] else rows[-1])
            raise IndexError(f"{worst} is no row of '{table.name}', which has {table.shape[0]}")
        dtype = np.dtype(np.uint16 if table.dtype == "bfloat16" else table.dtype)
        unique = np.empty((rows.size, *table.shape[1:]), dtype)
        places = (rows % table.shape[0]).tolist() if rows.size else []
        for _ in range(_ROW_ATTEMPTS):
            with self._open_weights(lookup.path) as file:
                if self._verify:
                    self._check_table(file)
                with _named(lookup.path):
                    _read_rows(file, lookup, places, unique, keep_cached=keep_cached)
                    if not self._verify or file.stamp_now() == file.stamp:
                        break
        else:
            raise ShardError(f"'{lookup.path}' changes all the time while it is read. Copy or export the model again.")
        if table.widened is not None:
            unique = widened(unique, table.dtype)
        result: NDArray[Any] = unique[inverse.reshape(indices.shape)]
        return result

    def _check_table(self, file: OpenFile) -> None:
        if self._stamps.has(file.name, file.stamp):
            return
        tied = self._tied.get(file.name)
        # A fresh file could change between the rows and the slices, and keep its stamp.
        if tied is None or is_fresh(file.stamp) or not tied.may_take_rows(file.stamp):
            self._hash_whole(file, self._files.records[file.name])

    def _fill(
        self,
        file: OpenFile,
        span: WeightsRange,
        parts: Sequence[Part],
        cancelled: Callable[[], bool],
        digest: Any,
        *,
        direct: bool,
    ) -> bool:
        """Read parts of a range, and add their bytes to the digest. Returns False when it was cancelled."""
        for part in parts:
            begin = page_floor(part.begin)
            skip = part.begin - begin
            # Bytes that are only hashed go through a small buffer, piece by piece.
            small = part.buffer.nbytes < part.end - begin
            pieces = read_range(
                file,
                span.offset + begin,
                part.end - begin,
                _over(part.buffer) if small else part.piece,
                _CHECK_BYTES if small else _PIECE_BYTES,
                most_bytes=0 if small else _MOST_PIECE_BYTES,
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
        return True

    def _hash_whole(self, file: OpenFile, record: FileRecord) -> None:
        """Compare all of an open file with the manifest's digests of it."""
        ranges = self._ranges.get(record.path, []) if record.ranges_apart else []
        digests, scratch = FileDigests.of(record, ranges), Buffer(_CHECK_BYTES)
        for piece in read_range(file, 0, record.nbytes, _over(scratch), _CHECK_BYTES):
            digests.update(piece)
            piece.release()
        scratch.close()
        if not digests.agree(record, ranges):
            raise ShardError(_damaged(record.path))
        self._stamps.add(record.path, file.stamp, file.stamp_now())

    @contextmanager
    def _open(self, record: FileRecord) -> Iterator[OpenFile]:
        opened = self._files.open(record.path)
        with ExitStack() as stack:
            with _named(record.path):
                descriptor = stack.enter_context(opened)
                stamp = stamp_of(descriptor)
            file = OpenFile(name=record.path, nbytes=record.nbytes, descriptor=descriptor, stamp=stamp)
            if os.fstat(descriptor).st_size != record.nbytes:
                raise wrong_size(file, record.nbytes)
            yield file

    @contextmanager
    def _open_weights(self, name: str) -> Iterator[OpenFile]:
        with self._open(self._files.records[name]) as file:
            self._check_header(file)
            yield file

    def _check_header(self, file: OpenFile) -> None:
        """Check the header: parsed at the first load, compared as bytes at later ones."""
        known = self._headers.get(file.name)
        with _named(file.name):
            if known is not None:
                if read_bytes(file, len(known), 0) != known:
                    raise ShardError(_damaged(file.name))
                return
            length = int.from_bytes(read_bytes(file, 8, 0), "little")
            tensors, slices = self._tensors.get(file.name, []), self._slices.get(file.name, [])
            most_bytes = most_header_bytes(len(tensors) + len(slices))
            if not 2 <= length <= min(most_bytes, file.nbytes - 8):
                raise ShardError(
                    f"'{file.name}' is no safetensors file: its header claims {length} bytes, and that of its tensors "
                    f"takes at most {most_bytes}. Copy or export the model again."
                )
            header = read_bytes(file, length, 8)
        check_header(file.name, header, tensors, slices)
        self._headers[file.name] = length.to_bytes(8, "little") + header


def _key(span: WeightsRange) -> str:
    return f"{span.path}@{span.offset}"


def _over(scratch: Buffer) -> Callable[[int, int], memoryview]:
    """A `place` for `read_range` where each piece replaces the one before."""
    return lambda begin, end: scratch.piece(0, end - begin)


def _with_gaps(parts: Sequence[Part], nbytes: int) -> list[Part]:
    """The parts, and others for the bytes between them, which share a small buffer that each piece refills."""
    ends = [0, *(part.end for part in parts)]
    begins = [*(part.begin for part in parts), nbytes]
    gaps = [(end, begin) for end, begin in zip(ends, begins, strict=True) if end < begin]
    scratch = Buffer(_CHECK_BYTES) if gaps else None
    return sorted([*parts, *(Part(*gap, scratch) for gap in gaps if scratch)], key=lambda part: (part.begin, part.end))


def _read_rows(file: OpenFile, lookup: Lookup, places: Sequence[int], rows: NDArray[Any], *, keep_cached: bool) -> None:
    """Read the rows at these places of a table, one into each row of the array."""
    flat = rows.view(np.uint8).reshape(-1).data if rows.size else memoryview(b"")
    row_bytes = len(flat) // max(len(places), 1)
    set_direct(file.descriptor, False)
    parts = lookup.parts or (lookup.table,)
    firsts = [0, *accumulate(part.shape[0] for part in parts)]
    advise = getattr(os, "posix_fadvise", None)
    if advise:
        for part in parts:
            advise(file.descriptor, part.offset, part.nbytes, os.POSIX_FADV_RANDOM)
    for row, place in enumerate(places):
        number = bisect_right(firsts, place) - 1
        begin = parts[number].offset + (place - firsts[number]) * row_bytes
        read_into(file, flat[row * row_bytes : (row + 1) * row_bytes], begin)
    if advise and not keep_cached:
        for part in parts:
            advise(file.descriptor, part.offset, part.nbytes, os.POSIX_FADV_DONTNEED)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn the system's refusal into a ShardError that names the file."""
    try:
        yield
    except OSError as error:
        raise unreadable(name, error) from error


def _damaged(name: str) -> str:
    return f"'{name}' is damaged: its sha256 is not the one in the manifest. Copy or export the model again."
