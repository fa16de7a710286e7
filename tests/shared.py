"""Folders that several worker processes of one test run share: the first that needs one makes it, the others wait."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["folder_of_the_run", "made_by_one"]


def folder_of_the_run(factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all worker processes of a test run have in common."""
    base = factory.getbasetemp()
    # pytest-xdist gives each worker a folder of its own, below the one of the run.
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_by_one(directory: Path, make: Callable[[Path], object]) -> Path:
    """The directory; `make` is called with a place beside it where no process has made it before, and fills that.

    A directory that is there is complete: a process gives it its name at the end.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(f"{directory.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            making = directory.with_name(f"{directory.name}.making")
            shutil.rmtree(making, ignore_errors=True)
            make(making)
            making.rename(directory)
    return directory
