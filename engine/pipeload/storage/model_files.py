"""The files of a model directory: each lies inside it, and each listed one is as exported."""

from __future__ import annotations

import errno
import hashlib
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath

from pipeload.errors import LoadError, ShardError
from pipeload.format.manifest import FileRecord, Manifest
from pipeload.machine.files import open_file, read_at, read_file

__all__ = ["ModelFiles", "unreadable"]

_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_LIMITS_REMEDY = "Raise the limits of the process (ulimit -a), or close files and end other programs."
_SETTINGS_BYTES = 16 << 20


class ModelFiles:
    """The files of one sharded model directory. May be used from any thread.

    A file that the manifest lists must be there, with the sha256 that the manifest gives. A file that it does not list
    was added by the user after the export, such as a `generation_config.json` of their own: it is read as it is.

    Args:
        directory: the sharded model directory.
        manifest: its validated manifest.
        verify: compare sha256; without it, a file that the user changed on purpose is read as it is. A listed file
            that is missing is an error in either case.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, verify: bool = True) -> None:
        self._directory = directory.resolve()
        self._verify = verify
        self.records: dict[str, FileRecord] = {record.path: record for record in manifest.files}
        # A new path for each pass would intern its parts anew: Python's table of interned texts, half a megabyte, grows
        # by the number of those that come and go, and is copied for it.
        self._kept: dict[str, Path] = {}

    def read(self, name: str, *, most_bytes: int = _SETTINGS_BYTES) -> bytes | None:
        """The content of a file, or None when neither the manifest lists it nor the directory has it.

        Args:
            name: path below the directory, with slashes.
            most_bytes: a file that holds more is refused.

        Raises:
            ShardError: a listed file is missing or is not the one that was exported; the file cannot be read, holds
                more, or lies outside the directory.
        """
        record = self.records.get(str(PurePosixPath(name)))
        try:
            data = read_file(self.path(name), most_bytes=most_bytes, below=self._directory)
        except FileNotFoundError as error:
            if record is None:
                return None
            raise unreadable(name, error) from error
        except OSError as error:
            raise unreadable(name, error) from error
        if record and self._verify and hashlib.sha256(data).hexdigest() != record.sha256:
            raise ShardError(
                f"'{name}' is not the file that was exported: it has {len(data)} bytes and another sha256 than the "
                "manifest's. Copy or export the model again; or load it with verify=False if you changed the file "
                "yourself."
            )
        return data

    def piece(self, name: str, offset: int, nbytes: int) -> bytes:
        """These bytes of a listed file, fewer only where it ends, unchecked.

        Raises:
            ShardError: it is not listed, is missing, cannot be read, or lies outside the directory.
        """
        if name not in self.records:
            raise ShardError(f"The manifest lists no file {name!r}.")
        try:
            with open_file(self.path(name), below=self._directory) as descriptor:
                return read_at(descriptor, nbytes, offset)
        except OSError as error:
            raise unreadable(name, error) from error

    def open(self, name: str) -> AbstractContextManager[int]:
        """A descriptor of a file, inside the directory whatever happens to its path meanwhile; see `open_file`.

        Raises:
            ShardError: as `path`.
            OSError: once the context is entered: as `open_file`.
        """
        return open_file(self.path(name), below=self._directory)

    def path(self, name: str) -> Path:
        """The path of a file, resolved: inside the directory, even through symbolic links.

        Raises:
            ShardError: the name, or a link, leads out of the directory or in a circle.
        """
        try:
            path = (self._directory / name).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            # A circle of links is a RuntimeError before Python 3.13; a NUL in the name is a ValueError.
            raise ShardError(
                f"{name!r} cannot be found in the model directory: {error}. Copy or export the model again."
            ) from error
        # A name with ".." could reach a listed file without being its name.
        if self._directory not in path.parents or ".." in PurePosixPath(name).parts:
            raise ShardError(f"'{name}' leads out of the model directory, to {path}. Export the model again.")
        self._kept[name] = path
        return path


def unreadable(name: str, error: OSError) -> ShardError | LoadError:
    """The error for a file of the model directory that the engine fails to read."""
    if error.errno in _NO_ROOM:
        # The file is as it was: the process has no room to read it.
        return LoadError(f"'{name}' cannot be read: {error.strerror}. {_LIMITS_REMEDY}")
    return ShardError(f"'{name}' cannot be read: {error.strerror or error}. Copy or export the model again.")
