"""The target appears whole or not at all, and the leftovers of an interrupted export go away."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeload.errors import ConfigError, ExportError
from pipeload_export import staging
from pipeload_export.staging import Staging

MARKER = "made"


def build(target: Path, text: str, *, force: bool = False) -> None:
    with Staging(target, MARKER, force=force) as folder:
        (folder.work / "intermediate").write_text(text)
        (folder.result / "deep").mkdir()
        (folder.result / "deep" / "file").write_text(text)
        (folder.result / MARKER).touch()
        folder.commit()


def content(target: Path) -> str:
    return (target / "deep" / "file").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_exchange(one: Path, other: Path) -> bool:
    """A kernel, or a file system, that cannot exchange two folders."""
    return False


@pytest.fixture(params=["exchange", "no exchange"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no exchange":
        monkeypatch.setattr(staging, "_exchange", no_exchange)


def test_appears_with_its_parents_and_nothing_else(tmp_path: Path) -> None:
    build(tmp_path / "a" / "b" / "model", "one")
    assert content(tmp_path / "a" / "b" / "model") == "one"
    assert names(tmp_path / "a" / "b") == ["model"]


@pytest.mark.usefixtures("kernel")
def test_replaces_only_with_force(tmp_path: Path) -> None:
    target = tmp_path / "model"
    build(target, "one")
    with pytest.raises(ConfigError, match=r"exists\. Name another one, or pass --force"):
        build(target, "two")
    assert content(target) == "one"
    build(target, "two", force=True)
    assert content(target) == "two"
    assert names(tmp_path) == ["model"]


def test_never_replaces_what_it_did_not_make(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds files, but no made"):
        build(home, "one", force=True)
    with pytest.raises(ConfigError, match="is a file"):
        build(home / "thesis.txt", "one", force=True)
    with pytest.raises(ConfigError, match="root of the file system"):
        Staging(Path("/"), MARKER, force=True).check()
    assert (home / "thesis.txt").read_text() == "years of work"


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    build(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    build(tmp_path / "link", "two", force=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == "two"


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model"
    build(target, "one")

    def fail() -> None:
        with Staging(target, MARKER, force=True) as folder:
            (folder.result / "half").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert content(target) == "one"
    assert names(tmp_path) == ["model"]


def test_one_export_to_a_target_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with Staging(target, MARKER, force=False) as folder:
        with pytest.raises(ExportError, match=f"Another export to {target} is under way .process {os.getpid()}"):
            build(tmp_path / "." / "model", "two")
        build(tmp_path / "other", "two")
        (folder.result / MARKER).touch()
        folder.commit()
    assert names(tmp_path) == ["model", "other"]


def test_many_at_once_leave_one_whole_target(tmp_path: Path) -> None:
    outcomes: list[str] = []
    start = threading.Barrier(8)

    def attempt(text: str) -> None:
        start.wait()
        try:
            build(tmp_path / "model", text, force=True)
            outcomes.append(text)
        except ExportError:
            outcomes.append("refused")

    threads = [threading.Thread(target=attempt, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    assert content(tmp_path / "model") in outcomes
    assert names(tmp_path) == ["model"]


def test_somebody_else_made_the_target_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def race() -> None:
        with Staging(target, MARKER, force=False) as folder:
            (folder.result / MARKER).touch()
            target.mkdir()
            folder.commit()

    with pytest.raises(ConfigError, match="exists"):
        race()
    assert names(tmp_path) == ["model"]


KILLED: dict[tuple[str, str], Callable[[str], str]] = {
    ("absent", "while it is written"): lambda kill: f"folder.result.joinpath('half').touch(); {kill}",
    ("absent", "before it is put in place"): lambda kill: f"Path.rename = lambda *_: {kill}; folder.commit()",
    ("absent", "after it was put in place"): lambda kill: (
        f"staging._sync_folder = lambda path: {kill} if path == folder._target.parent else None; folder.commit()"
    ),
    ("whole", "before the exchange"): lambda kill: f"staging._exchange = lambda *_: {kill}; folder.commit()",
    ("whole", "after the exchange"): lambda kill: (
        f"staging._sync_folder = lambda path: {kill} if path == folder._target.parent else None; folder.commit()"
    ),
    ("whole", "after the old one was moved away"): lambda kill: (
        "staging._exchange = lambda *_: False; rename = Path.rename; calls = []\n"
        f"    Path.rename = lambda *a: {kill} if calls else (calls.append(1), rename(*a))[1]\n"
        "    folder.commit()"
    ),
}


@pytest.mark.parametrize(("before", "moment"), KILLED)
def test_killed(tmp_path: Path, before: str, moment: str) -> None:
    target = tmp_path / "model"
    if before == "whole":
        build(target, "old")
    kill = f"os.kill(os.getpid(), {signal.SIGKILL.value})"
    code = (
        "import os\nfrom pathlib import Path\nfrom pipeload_export import staging\n"
        f"with staging.Staging(Path({str(target)!r}), {MARKER!r}, force=True) as folder:\n"
        "    folder.result.joinpath('deep').mkdir()\n"
        "    folder.result.joinpath('deep', 'file').write_text('new')\n"
        f"    folder.result.joinpath({MARKER!r}).touch()\n"
        f"    {KILLED[before, moment](kill)}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == -signal.SIGKILL
    if target.exists():
        assert content(target) in ("old", "new")
    # The next export first brings the old target back, or finds it, and refuses as it would have.
    if before == "whole":
        with pytest.raises(ConfigError, match="exists"):
            build(target, "next")
        assert content(target) in ("old", "new")
        assert names(tmp_path) == ["model"]
    build(target, "next", force=True)
    assert content(target) == "next"
    assert names(tmp_path) == ["model"]


def test_a_lock_that_a_full_disk_does_not_take_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            build(tmp_path / "model", "new")
    assert names(tmp_path) == []
    build(tmp_path / "model", "new")
    assert names(tmp_path) == ["model"]
