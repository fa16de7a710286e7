"""Names in a manifest that lead out of the directory, and other things than files in the place of a file.

The attacker gives away a model directory, or changes one. He wants the engine to read files of the user that are none
of the model's, to block for ever, or to read without end.
"""

from __future__ import annotations

import os
import socket
import stat
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.attacks.attack import HELD, SucceededError, attack, refused, run_module
from tests.attacks.victims import FILES, GRAPH, WEIGHTS, change_manifest, model_directory, read_all

from pipeload.errors import ManifestError, ShardError
from pipeload.format.manifest import MANIFEST_NAME

_NAMES = {
    "..": "../secret.txt",
    "two dots in the middle": "shards/../../secret.txt",
    "an absolute path": "/etc/passwd",
    "a NUL": "shards/block.001.onnx\0.safetensors",
    "a backslash": "..\\secret.txt",
    "another way to write it": "shards/./block.001.onnx",
    "two slashes": "shards//block.001.onnx",
    "nothing": "",
}


def _renamed(directory: Path, name: str) -> Path:
    """The manifest calls a graph by another name."""

    def change(made: dict[str, object]) -> None:
        for record in made["files"]:
            if record["path"] == GRAPH:
                record["path"] = name
        for shard in made["shards"]:
            if shard["graph"]["path"] == GRAPH:
                shard["graph"]["path"] = name

    return change_manifest(directory, change)


@attack
def names_that_lead_out(folder: Path) -> str:
    """A manifest names a file by `..`, an absolute path, a NUL, a backslash or a second spelling."""
    directory = model_directory(folder)
    kept = (directory / MANIFEST_NAME).read_bytes()
    outcome = HELD
    for name in _NAMES.values():
        (directory / MANIFEST_NAME).write_bytes(kept)
        outcome = refused(lambda name=name: read_all(_renamed(directory, name)), ManifestError, "file '")
    return outcome


@attack
def names_that_are_too_long(folder: Path) -> str:
    """A manifest names a file by more characters than any file system takes."""
    return refused(
        lambda: read_all(_renamed(model_directory(folder), "a" * 100_000)), ManifestError, "100000 characters"
    )


@attack
def lookalikes(folder: Path) -> str:
    """A manifest names a file by look-alikes of its name, of two dots or of a slash, by another normal form or case."""
    directory = model_directory(folder)
    kept = (directory / MANIFEST_NAME).read_bytes()
    (directory / "shards" / unicodedata.normalize("NFD", "é.onnx")).write_bytes((directory / GRAPH).read_bytes())
    outcome = HELD
    for name in ("shards/blоck.001.onnx", "．．/secret.txt", "‥/secret.txt", "..∕secret.txt",  # noqa: RUF001
                 unicodedata.normalize("NFC", "shards/é.onnx"), "SHARDS/BLOCK.001.ONNX"):  # fmt: skip
        (directory / MANIFEST_NAME).write_bytes(kept)
        outcome = refused(lambda name=name: read_all(_renamed(directory, name)), ShardError, "cannot be read")
    return outcome


@attack
def links_in_each_part_of_a_path(folder: Path) -> str:
    """A file, or the folder it lies in, is a symbolic link out of the directory, to a device, to /proc or to itself."""
    directory = model_directory(folder)
    outcome = HELD
    for name in FILES[1:]:
        path = directory / name
        for target in (folder / "secret.txt", "/dev/zero", "/proc/self/environ", "../secret.txt", path):
            with _in_place_of(path):
                path.symlink_to(target)
                outcome = refused(lambda: read_all(directory), ShardError)
    (directory / "shards").rename(folder / "elsewhere")
    (directory / "shards").symlink_to(folder / "elsewhere")
    refused(lambda: read_all(directory), ShardError, "leads out of the model directory")
    return outcome


@attack
def other_things_than_files(folder: Path) -> str:
    """A pipe, a socket, a device or a directory lies in the place of each kind of file."""
    directory = model_directory(folder)
    outcome = HELD
    for name in FILES:
        path = directory / name
        for make in _MAKERS:
            with _in_place_of(path):
                try:
                    make(path)
                except PermissionError:
                    continue  # only root makes devices
                outcome = refused(lambda: read_all(directory), (ShardError, ManifestError), "cannot be read")
    return outcome


@attack
def a_hard_link_in_the_place_of_a_listed_file(folder: Path) -> str:
    """A listed file is a hard link to a file of the user's."""
    directory = model_directory(folder)
    (directory / WEIGHTS).unlink()
    os.link(folder / "secret.txt", directory / WEIGHTS)
    return refused(lambda: read_all(directory), ShardError, "the manifest says")


@attack
def errors_that_quote_a_foreign_file(folder: Path) -> str:
    """A settings file is damaged on purpose, so that the error message quotes another file."""
    directory = model_directory(folder)
    (directory / "config.json").unlink()
    os.link(folder / "secret.txt", directory / "config.json")
    outcome = refused(lambda: _config(directory), ShardError, "is damaged")
    if "secret" in outcome.replace("secret.txt", ""):
        raise SucceededError(outcome)
    return outcome


def _config(directory: Path) -> object:
    from pipeload.format import manifest as manifests
    from pipeload.storage.model_files import ModelFiles
    from pipeload.tasks.model_files import read_config

    return read_config(ModelFiles(directory, manifests.read(directory)))


def _socket(path: Path) -> None:
    # Names of sockets are short, so it is made in its folder.
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def _device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))


_MAKERS: tuple[Callable[[Path], object], ...] = (Path.mkdir, os.mkfifo, _socket, _device)


@contextmanager
def _in_place_of(path: Path) -> Iterator[None]:
    """The file is out of the way; what lies there at the end is removed."""
    kept = path.rename(path.with_name(f"kept-{path.name}"))
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        kept.rename(path)


if __name__ == "__main__":
    run_module(Path(__file__).stem)
