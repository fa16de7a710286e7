"""What another local user plants where an export writes: links, second names and folders of killed exports.

The attacker may write into the folder in which the user's export will lie, such as /tmp. He wants a file of the user
overwritten, removed or read, or weights of his own in the user's model.
"""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

from tests.attacks.attack import HELD, SucceededError, attack, refused, run_module

from pipeload.errors import ExportError
from pipeload.machine import files
from pipeload_export import staging
from pipeload_export.staging import Staging

_PRECIOUS = "the user's own"


@attack
def a_link_in_the_place_of_the_lock(folder: Path) -> str:
    """The lock file, into which the process id is written, is a symbolic link or a second name of a user's file."""
    precious = _precious(folder)
    lock = folder / ".model.lock"
    outcome = HELD
    for plant in (lambda: lock.symlink_to(precious), lambda: os.link(precious, lock), lambda: os.mkfifo(lock)):
        plant()
        outcome = refused(lambda: _build(folder / "model"), ExportError, "which no export has made")
        lock.unlink()
        _check(precious)
    return outcome


@attack
def a_link_in_the_place_of_the_staging_folder(folder: Path) -> str:
    """The attacker has guessed the random name of the staging folder, and a link to a folder of the user lies there."""
    precious = _precious(folder)
    with mock.patch.object(staging.secrets, "token_hex", return_value="00000000"):
        planted = folder / f".model.staging-{os.getpid()}-00000000"
        planted.symlink_to(precious.parent)
        outcome = refused(lambda: _build(folder / "model"), FileExistsError)
    _check(precious)
    return outcome


@attack
def links_in_the_place_of_leftovers(folder: Path) -> str:
    """Links to a folder of the user stand for what killed exports have left, and the next one removes or takes."""
    precious = _precious(folder)
    (precious.parent / "identity").write_text("same")
    (precious.parent / "work").mkdir()
    (folder / ".model.staging-1-00000000").symlink_to(precious.parent)
    (folder / ".model.old-1-00000000").symlink_to(precious.parent)
    _build(folder / "model")
    _check(precious)
    if not (precious.parent / "work").is_dir() or (folder / "model").is_symlink():
        raise SucceededError("a folder of the user was taken for a leftover")
    return HELD


@attack
def leftovers_of_another_user(folder: Path) -> str:
    """A folder of another user claims to be a killed export of the same model, with its weights ready."""
    planted = folder / ".model.staging-1-00000000"
    planted.mkdir()
    (planted / "identity").write_text("same")
    (planted / "journal").write_text("{}")
    with mock.patch.object(staging.os, "geteuid", return_value=os.getuid() + 1):
        with _staging(folder / "model") as made:
            if (made.root / "before" / planted.name).exists():
                raise SucceededError("another user's files were taken over")
    return HELD


@attack
def a_link_in_the_place_of_an_output(folder: Path) -> str:
    """The file that a command writes whole is a link to a file of the user, and comes when its path was looked at."""
    precious = _precious(folder)
    path = folder / "out.json"
    write = Path.write_bytes

    def then_plant(self: Path, data: bytes) -> int:
        path.unlink(missing_ok=True)
        path.symlink_to(precious)
        return write(self, data)

    with mock.patch.object(Path, "write_bytes", then_plant):
        files.replace_file(path, b"output")
    _check(precious)
    if path.is_symlink():
        raise SucceededError("the link stayed")
    return HELD


def _precious(folder: Path) -> Path:
    path = folder / "home" / "precious.txt"
    path.parent.mkdir()
    path.write_text(_PRECIOUS)
    return path


def _check(path: Path) -> None:
    if path.read_text() != _PRECIOUS:
        raise SucceededError(f"{path} has changed")


def _staging(target: Path) -> Staging:
    made = Staging(target, "made", force=False)
    made.resume("same")
    return made


def _build(target: Path) -> None:
    with _staging(target) as made:
        (made.result / "made").touch()
        made.commit()


if __name__ == "__main__":
    run_module(Path(__file__).stem)
