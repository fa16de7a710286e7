"""A node's disk for files that it takes from other nodes: whole or not there, checked, and within a limit.

```
FOLDER/<sha256 of the manifest>/pipeload.json, shards/block.003.onnx ...   as in the model directory of another node
                                pipeload.json.name                        the model's name there
                                shards/block.003.safetensors.part         what has come of a file
```
A model's folder goes when another one needs its room, unless it is open here, or was used in the last ten minutes: also
by nodes that took files of it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeload.errors import ConfigError, LoadError, ShardError
from pipeload.foreign import foreign_errors
from pipeload.format.manifest import MANIFEST_NAME, FileRecord, Manifest
from pipeload.machine.files import append_file, open_file, read_at, read_file, replace_file
from pipeload.machine.sizes import format_bytes
from pipeload.storage.digests import FileDigests, ranges_of

__all__ = ["PIECE_BYTES", "Incoming", "Store", "files_of"]

PIECE_BYTES = 1 << 20
"""Of a file, in one message."""
_FRESH_S = 600.0
_NOTED_S = 60.0
"""Other nodes' use of a folder is noted at most this often."""
_PART = ".part"
_NAME_BYTES = 4096
_NAME = f"{MANIFEST_NAME}.name"


def files_of(own: Manifest, whole: Manifest) -> list[FileRecord]:
    """The files that a stage needs: those of its shards, and the model's settings.

    Args:
        own: of the stage.
        whole: of the model.
    """
    wanted, others = set(_paths(own)), set(_paths(whole))
    draft = None if whole.draft is None else f"{whole.draft.path}/"
    return [
        record
        for record in whole.files
        if record.path in wanted or not (record.path in others or (draft is not None and record.path.startswith(draft)))
    ]


class Store:
    """The folder. For one thread at a time.

    Args:
        folder: it is made with the first file.
        most_bytes: the most that all files in it may take.

    Attributes:
        most_bytes: see above.
        names: sha256 of the manifest -> name, of each model that has a folder.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder = folder
        self.most_bytes = most_bytes
        self.names = self._found()

    def directory(self, sha256: str) -> Path:
        """A model's folder, which may not be there.

        Args:
            sha256: of the model's manifest.
        """
        return self._folder / sha256

    def begin(self, sha256: str, name: str, content: bytes) -> Path:
        """Make or find a model's folder, with its manifest, and note that it is used now.

        Args:
            sha256: of the manifest.
            name: the model's; "" leaves it as it is.
            content: the manifest.

        Raises:
            LoadError: it cannot be written.
        """
        directory = self.directory(sha256)
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if name and self.names.get(sha256) != name:
                replace_file(directory / _NAME, name.encode())
                self.names = {**self.names, sha256: name}
            replace_file(directory / MANIFEST_NAME, content)
        return directory

    def note_use(self, sha256: str) -> None:
        """Another node takes a file of a model, which may have no folder."""
        directory = self.directory(sha256)
        # It may go at this moment.
        with suppress(OSError):
            if _used_s(directory) < time.time() - _NOTED_S:
                os.utime(directory / MANIFEST_NAME)

    def missing(self, sha256: str, records: Iterable[FileRecord]) -> list[FileRecord]:
        """Those of the files that are not there whole."""
        directory = self.directory(sha256)
        return [record for record in records if not (directory / record.path).is_file()]

    def make_room(self, sha256: str, records: Iterable[FileRecord], in_use: Collection[str]) -> None:
        """Make room for a model's files: the folders of others go, those first that were used the longest time ago.

        Args:
            sha256: of the model's manifest.
            records: all files that it is to have here.
            in_use: sha256 of the models that are open here.

        Raises:
            ConfigError: they do not fit within the limit, or on the disk.
            LoadError: a folder cannot be removed.
        """
        directory = self.directory(sha256)
        missing = self.missing(sha256, records)
        with _writing(self._folder):
            parts = sum(_size(_part(directory / record.path)) for record in missing)
            needed = sum(record.nbytes for record in missing) - parts
            now = time.time()
            others = [
                (used_s, other)
                for other in self._folder.iterdir()
                if other.name != sha256 and other.name not in in_use
                if (used_s := _used_s(other)) < now - _FRESH_S
            ]
            for _, other in sorted(others):
                if self._nbytes() + needed <= self.most_bytes:
                    break
                self.names = {known: name for known, name in self.names.items() if known != other.name}
                shutil.rmtree(other)
            taken, free = self._nbytes(), shutil.disk_usage(self._folder).free
        if taken + needed > self.most_bytes or needed > free:
            raise ConfigError(
                f"Shards of {format_bytes(needed)} are to be fetched. {self._folder} has {format_bytes(taken)} of at "
                f"most {format_bytes(self.most_bytes)}, and its disk {format_bytes(free)} of room. Start the node with "
                "a larger --fetch, or make room there."
            )

    def incoming(self, sha256: str, manifest: Manifest, record: FileRecord) -> Incoming:
        """A file that is to come; what has come of it before counts.

        Raises:
            LoadError: the part cannot be read.
        """
        return Incoming(self.directory(sha256) / record.path, manifest, record)

    def _found(self) -> dict[str, str]:
        """The names of an earlier start; a folder without one is found by its sha256 only."""
        found = {}
        for path in self._folder.glob(f"*/{_NAME}"):
            with suppress(OSError, UnicodeDecodeError):
                found[path.parent.name] = read_file(path, most_bytes=_NAME_BYTES).decode()
        return found

    def _nbytes(self) -> int:
        return sum(_size(Path(folder, name)) for folder, _, names in os.walk(self._folder) for name in names)


class Incoming:
    """A file that comes in pieces, one behind the other.

    Args:
        path: of the whole file.
        manifest: of the whole model.
        record: the file.

    Attributes:
        record: see above.
    """

    def __init__(self, path: Path, manifest: Manifest, record: FileRecord) -> None:
        self._path, self.record = path, record
        self._ranges = ranges_of(manifest).get(record.path, []) if record.ranges_apart else []
        self._digests = FileDigests.of(record, self._ranges)
        part = _part(path)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if _size(part) > record.nbytes:
                part.unlink()
            if part.exists():
                with open_file(part) as descriptor:
                    while piece := read_at(descriptor, PIECE_BYTES, self._digests.position):
                        self._digests.update(piece)

    @property
    def position(self) -> int:
        """Bytes that are there."""
        return self._digests.position

    @property
    def left(self) -> int:
        """Bytes that are still to come."""
        return self.record.nbytes - self.position

    def add(self, piece: bytes) -> None:
        """Keep the next piece.

        Raises:
            LoadError: it cannot be written.
            ShardError: it is none, or more than the file has.
        """
        if not 0 < len(piece) <= self.left:
            raise ShardError(
                f"'{self.record.path}' has another size there than the manifest says: {len(piece)} bytes came, and "
                f"{self.left} are left."
            )
        with _writing(self._path):
            append_file(_part(self._path), piece)
        self._digests.update(piece)

    def finish(self) -> None:
        """Check the whole file, and give it its name.

        Raises:
            ShardError: it is not the one of the manifest; nothing of it is kept.
            LoadError: it cannot be written.
        """
        part = _part(self._path)
        with _writing(self._path):
            if not self.record.nbytes:
                part.touch()
            if not self._digests.agree(self.record, self._ranges):
                part.unlink(missing_ok=True)
                raise ShardError(f"'{self.record.path}' came with another sha256 than the manifest's.")
            part.replace(self._path)


def _paths(manifest: Manifest) -> Iterator[str]:
    for shard in manifest.shards:
        yield shard.graph.path
        if shard.weights:
            yield shard.weights.path
        yield from (lookup.path for lookup in shard.lookups)


def _part(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _used_s(directory: Path) -> float:
    manifest = directory / MANIFEST_NAME
    return manifest.stat().st_mtime if manifest.exists() else 0.0


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    with foreign_errors(
        LoadError, f"{path} cannot be written", "Look at its disk and permissions, or start the node without --fetch."
    ):
        yield
