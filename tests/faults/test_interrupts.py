"""Ctrl-C wherever the interpreter looks at signals, in code that holds descriptors and folders, leaves none of them."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from tests.engine import toy as toys
from tests.engine.harness import agents
from tests.faults.injector import Injector, interrupted

import pipeload
from pipeload.machine.files import read_file, read_stream
from pipeload_export.staging import Staging


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    """Each try collects garbage, and need not look at all that was there before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - iterdir leaves its own one open


def _at_each_place(use: Callable[[], object], check: Callable[[], object]) -> int:
    """Interrupt a use at its first place, its second ..., and check after each. Returns the number of places."""
    for number in count(1):
        injector = Injector(kind="interrupt", fault="Ctrl-C", at=number, armed=True)
        with suppress(KeyboardInterrupt), interrupted(injector):
            use()
        injector.disarm()
        if injector.error is not None:
            injector.error.__traceback__ = None
        gc.collect()
        check()
        if not injector.fired:
            return number - 1
    raise AssertionError  # of an endless loop


@pytest.mark.parametrize("way", ["below a folder", "alone", "as a stream"])
def test_reading_a_file_leaves_no_descriptor(tmp_path: Path, way: str) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"content")
    uses: dict[str, Callable[[], object]] = {
        "below a folder": lambda: read_file(path, most_bytes=100, below=tmp_path),
        "alone": lambda: read_file(path, most_bytes=100),
        "as a stream": lambda: read_stream(path, most_bytes=100),
    }
    before = _descriptors()

    def check() -> None:
        assert _descriptors() == before

    assert _at_each_place(uses[way], check) > 10


# An interrupt of `__del__` goes no further.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_staging_leaves_its_target_as_a_whole_or_nothing(tmp_path: Path) -> None:
    target, before = tmp_path / "target", _descriptors()

    def use() -> None:
        with Staging(target, "marker", force=True) as staging:
            (staging.result / "marker").write_text("new")
            staging.commit()

    def check() -> None:
        assert [path.name for path in tmp_path.iterdir()] in ([], ["target"])
        if target.exists():
            assert (target / "marker").read_text() == "new"
            (target / "marker").unlink()
            target.rmdir()
        assert _descriptors() == before

    assert _at_each_place(use, check) > 40


@pytest.mark.parametrize("name", ["fstat", "lstat", "stat"])
def test_a_lock_file_that_cannot_be_looked_at_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The system fails once: at the first look, at the second ..."""
    real = getattr(os, name)
    looks: Iterator[int]
    failing_look = 0

    def look(*arguments: object, **options: object) -> object:
        if next(looks) == failing_look:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments, **options)

    for failing_look in count(1):
        looks = count(1)
        with monkeypatch.context() as patch, suppress(OSError):
            patch.setattr(os, name, look)
            with Staging(tmp_path / "target", "marker", force=False):
                pass
        assert [path.name for path in tmp_path.iterdir()] == []
        if next(looks) <= failing_look:
            break


# A file that is interrupted when it has just been opened is closed by its end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_closing_a_model_gives_everything_back(tmp_path: Path) -> None:
    """Also where the caller does not close it again: the end of a `with` does not."""
    toys.make_toy(tmp_path / "toy", blocks=3)
    budget = pipeload.Budget("8GB")
    models = [pipeload.load(tmp_path / "toy", budget)]

    def check() -> None:
        model = models.pop()
        if model._finalizer.alive:
            # It has not begun: the model is open as before.
            model.run(toys.inputs())
            model.close()
        assert not agents()
        assert not model._pipeline._exchange.residents.shards
        assert not budget._shares.opened
        models.append(pipeload.load(tmp_path / "toy", budget))
        models[0].run(toys.inputs())

    assert _at_each_place(lambda: models[0].close(), check) > 20
    models[0].close()
