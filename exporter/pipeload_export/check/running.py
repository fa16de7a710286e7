"""The engine opens a finished directory and runs it: with right files and right answers it may still be no model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pipeload
from pipeload.errors import BudgetError, ExportError, PipeloadError
from pipeload.format.manifest import Manifest
from pipeload.measuring.profiler import measure
from pipeload.notify import Notify
from pipeload_export.check.cases import sample_cases

__all__ = ["check_running", "given_room", "opened"]

_Made = TypeVar("_Made")
_STEP = "run the engine"


def check_running(directory: Path, manifest: Manifest, progress: Notify) -> None:
    """Open the directory as a user does, and make one pass.

    Args:
        directory: the sharded model directory.
        manifest: its manifest.
        progress: called with the name of the step, the part done, and the whole.

    Raises:
        ExportError: the engine cannot.
    """
    progress(_STEP, 0, 1)
    inputs = sample_cases(manifest, directory)[0].inputs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pipeload.QuantisationWarning)
            model = opened(directory)
        with model:
            given_room(model, partial(model.run, inputs))
    except PipeloadError as error:
        raise ExportError(f"The engine cannot run what was exported: {error}") from error
    progress(_STEP, 1, 1)


def opened(directory: Path) -> pipeload.Model:
    """The model under the free memory, or under the smallest budget that works: an export has no budget to keep."""
    options: dict[str, Any] = {"verify": False, "profile": measure()}
    try:
        return pipeload.load(directory, **options)
    except BudgetError as error:
        return pipeload.load(directory, error.needed_bytes, **options)


def given_room(model: pipeload.Model, call: Callable[[], _Made]) -> _Made:
    """What the call returns, under a larger budget where it needs one."""
    try:
        return call()
    except BudgetError as error:
        model.set_budget(error.needed_bytes)
        return call()
