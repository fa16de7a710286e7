"""Files that change between a check and the use of what was checked.

The attacker is another local user, or a program, that can write into a model directory while it is used. He wants the
engine to use bytes that no check has seen, or to read a file outside of the directory. The hooks stand exactly where
the path has been checked and nothing is open yet, or where the file is open and nothing is read yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from tests.attacks.attack import HELD, SucceededError, attack, refused, run_module
from tests.attacks.victims import FILES, GRAPH, WEIGHTS, model_directory, read_all

from pipeload.errors import ManifestError, ShardError
from pipeload.machine import files as opening
from pipeload.storage import weights as storages
from pipeload.storage.model_files import ModelFiles

_LISTED = FILES[1:4]
_EVIL = b"{{ 'evil' }}"


@contextmanager
def _once_checked(name: str, change: Callable[[], object]) -> Iterator[None]:
    """The change happens when the path of that file has been checked, and before it is opened."""
    check = ModelFiles.path

    def then_change(self: ModelFiles, asked: str) -> Path:
        found = check(self, asked)
        if asked == name:
            change()
        return found

    with mock.patch.object(ModelFiles, "path", then_change):
        yield


@contextmanager
def _once_open(path: Path, change: Callable[[], object]) -> Iterator[None]:
    """The change happens when that file is open, and before anything is asked of its descriptor."""
    opened, place = os.open, path.resolve()

    def then_change(*arguments: object, **options: object) -> int:
        descriptor: int = opened(*arguments, **options)
        if Path(f"/proc/self/fd/{descriptor}").readlink() == place:
            change()
        return descriptor

    with mock.patch.object(opening.os, "open", then_change):
        yield


@attack
def a_link_that_comes_after_the_check(folder: Path) -> str:
    """Each file is swapped for a symbolic link out of the directory when its path has been checked."""
    outcome = HELD
    for number, name in enumerate(FILES[1:]):
        directory, path, evil = _victim(folder / str(number), name)
        with _once_checked(name, lambda path=path, evil=evil: _link(path, evil)):
            outcome = refused(lambda directory=directory: read_all(directory), ShardError, "while it was opened")
    return outcome


@attack
def a_folder_that_becomes_a_link_after_the_check(folder: Path) -> str:
    """The folder of a file is swapped for a link to a folder elsewhere with a file of the same name and size."""
    outcome = HELD
    for number, name in enumerate(_LISTED):
        directory, path, _ = _victim(folder / str(number), name)

        def swap(path: Path = path) -> None:
            elsewhere = path.parents[2] / "elsewhere"
            path.parent.rename(elsewhere)
            path.parent.symlink_to(elsewhere)

        with _once_checked(name, swap):
            outcome = refused(lambda directory=directory: read_all(directory), ShardError, "while it was opened")
    return outcome


@attack
def another_file_that_comes_after_the_check(folder: Path) -> str:
    """Each listed file is replaced, by rename, with one of the same size when its path has been checked."""
    outcome = HELD
    for number, name in enumerate(_LISTED):
        directory, path, evil = _victim(folder / str(number), name)
        with _once_checked(name, lambda path=path, evil=evil: evil.exists() and evil.replace(path)):
            outcome = refused(lambda directory=directory: read_all(directory), ShardError)
    return outcome


@attack
def another_file_that_comes_once_it_is_open(folder: Path) -> str:
    """Each file is replaced, or removed, when it is open: the checked descriptor is read, and nothing else."""
    for number, name in enumerate(FILES):
        directory, path, evil = _victim(folder / str(number), name)
        wanted = read_all(directory)
        with _once_open(path, lambda path=path, evil=evil: evil.exists() and evil.replace(path)):
            if read_all(directory) != wanted:
                raise SucceededError(f"other bytes of {name} were used")
    return HELD


@attack
def the_graph_that_onnxruntime_gets(folder: Path) -> str:
    """A graph's folder is swapped for another between the check and onnxruntime, and back before a second check."""
    directory, path, _ = _victim(folder, GRAPH)
    good = path.read_bytes()
    check = storages.check_graph

    def then_swap(*arguments: object) -> None:
        check(*arguments)
        path.parent.rename(directory / "good")
        path.parent.mkdir()
        path.write_bytes(b"evil")

    from pipeload.format import manifest as manifests

    manifest = manifests.read(directory)
    shard = next(one for one in manifest.shards if one.graph.path == GRAPH)
    with mock.patch.object(storages, "check_graph", then_swap):
        if storages.Storage(directory, manifest).graph(shard).data != good:
            raise SucceededError("onnxruntime got another graph than the one that was checked")
    return HELD


@attack
def a_file_that_shrinks(folder: Path) -> str:
    """Each listed file is cut when it is open, before its size is looked at and after."""
    outcome = HELD
    for number, name in enumerate(_LISTED):
        directory, path, _ = _victim(folder / str(number), name)
        with _once_open(path, lambda path=path: os.truncate(path, 1000)):
            outcome = refused(lambda directory=directory: read_all(directory), ShardError)
    directory, path, _ = _victim(folder / "later", WEIGHTS)
    read = storages.read_range

    def cut_first(*arguments: object, **options: object) -> object:
        os.truncate(path, 4096 + 100)
        return read(*arguments, **options)

    with mock.patch.object(storages, "read_range", cut_first):
        refused(lambda: read_all(directory), ShardError)
    return outcome


@attack
def a_file_that_grows(folder: Path) -> str:
    """Each settings file and the manifest grow without end when they are open."""
    outcome = HELD
    for number, name in enumerate((FILES[0], *FILES[4:])):
        directory, path, _ = _victim(folder / str(number), name)
        with _once_open(path, lambda path=path: os.truncate(path, 1 << 40)):
            outcome = refused(
                lambda directory=directory: read_all(directory), (ShardError, ManifestError), "holds more"
            )
    return outcome


@attack
def bytes_that_change_while_they_are_read(folder: Path) -> str:
    """A weights file that was found right before is overwritten in place while it is read."""
    directory, path, _ = _victim(folder, WEIGHTS)
    read = storages.read_range

    def change_first(*arguments: object, **options: object) -> object:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
        return read(*arguments, **options)

    with mock.patch.object(storages, "read_range", change_first):
        return refused(lambda: read_all(directory), ShardError, "is damaged")


def _victim(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """A directory, one of its files, and the attacker's file of the same size."""
    folder.mkdir(exist_ok=True)
    directory = model_directory(folder)
    path, evil = directory / name, folder / "evil"
    size = path.stat().st_size
    evil.write_bytes((_EVIL * (size // len(_EVIL) + 1))[:size])
    return directory, path, evil


def _link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


if __name__ == "__main__":
    run_module(Path(__file__).stem)
