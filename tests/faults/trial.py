"""One fault in one operation: what the caller gets, what works afterwards, and whether anything is lost."""

from __future__ import annotations

import faulthandler
import gc
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tests.engine.still_machine import stand_still
from tests.faults.injector import CallersOwn, Injector, interrupted, live_maps, patched
from tests.faults.operations import CommandFailed, Operation, Place

from pipeload.errors import ClosedError, PipeloadError
from pipeload.foreign import chain
from pipeload.pipeline.pipeline import Pipeline
from pipeload.pipeline.reservations import Reservations

__all__ = ["Hang", "Result", "attempt"]

_CALLS = 3
"""One fault may be met by the call in which it came, or by the next; the others give the right answer."""
_LIMIT_S = 120.0
_CHECK_BYTES = 1 << 20
"""A buffer of this size is a check's, which no plan counts."""
_CLOSENESS = 1e-4


class Hang(Exception):  # noqa: N818 - ends the walk
    """A try has not ended: the process holds threads that no later try can be told from."""


@dataclass(slots=True, kw_only=True)
class Result:
    """What came of one try.

    Attributes:
        fired: the fault has come.
        place: where.
        outcome: what the caller saw.
        answer: where it was asked for.
        failures: promises that were broken.
    """

    fired: bool = False
    place: str = ""
    outcome: str = ""
    answer: Any = None
    failures: list[str] = field(default_factory=list)


def attempt(operation: Operation, injector: Injector, models: Path, expected: Any) -> Result:
    """Try an operation with one fault, in a thread of its own.

    Args:
        operation: see `OPERATIONS`.
        injector: says which fault comes when.
        models: see `prepare`.
        expected: the answer of a call that nothing disturbs; None where this try is to find it: it is the `answer`.

    Raises:
        Hang: the stacks of all threads are on stderr.
    """
    result = Result()
    before = _Inventory()
    with tempfile.TemporaryDirectory(prefix="pipeload-faults-") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        (folder / "tmp").mkdir()
        patch.setenv("PIPELOAD_CACHE", str(folder / "cache"))
        patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        stand_still(patch)
        place = Place(models=models, folder=folder, notify=lambda: _note(injector))
        caller = threading.Thread(
            target=_caller, args=(operation, injector, place, expected, result), name="faults-caller", daemon=True
        )
        caller.start()
        caller.join(_LIMIT_S)
        if caller.is_alive():
            faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__)
            raise Hang(f"{operation.name}: {injector.kind}, {injector.fault}, at {injector.at}, in {injector.place}")
        left = [str(path.relative_to(folder)) for path in folder.rglob("*") if _is_temporary(path, folder)]
        if left:
            result.failures.append(f"files were left: {left}")
    if injector.error is not None:
        # The frames of an error that was swallowed would keep what they refer to.
        injector.error.__traceback__ = None
    result.failures += before.lost()
    result.fired, result.place = injector.fired, injector.place
    return result


def _note(injector: Injector) -> None:
    injector.event("callback")


def _is_temporary(path: Path, folder: Path) -> bool:
    return path.parent == folder / "tmp" or ".staging-" in path.name or path.suffix == ".lock"


class _Inventory:
    """What the process holds, to be told from what it holds later."""

    def __init__(self) -> None:
        gc.collect()
        self._threads = set(threading.enumerate())
        self._descriptors = _descriptors()
        self._maps = len(live_maps())
        self._reservations: list[Reservations] = []
        self._pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()
        self._patches = ExitStack()
        for kind, noted in ((Reservations, self._reservations.append), (Pipeline, self._pipelines.add)):
            self._patches.enter_context(mock.patch.object(kind, "__init__", _noting(kind.__init__, noted)))

    def lost(self) -> list[str]:
        """What is there and was not; open pipelines are closed, so that they do not count for the next try."""
        self._patches.close()
        gc.collect()
        found = [f"a model stays open: {one!r}" for one in self._pipelines if not _is_closed(one)]
        for thread in set(threading.enumerate()) - self._threads:
            # Its last call may have ended before it: `pipeload-closer`, or a pool's.
            thread.join(0 if found else 10)
            if thread.is_alive():
                found.append(f"a thread lives on: {thread.name}")
        gc.collect()
        if more := sorted(set(_descriptors()) - set(self._descriptors)):
            found.append(f"descriptors are open: {more}")
        if len(live_maps()) > self._maps:
            found.append(f"buffers were not given back: {live_maps()[self._maps :]}")
        # Of one whose making was interrupted there is no figure, and no agent has it.
        if held := [nbytes for one in self._reservations if (nbytes := getattr(one, "reserved_bytes", 0))]:
            found.append(f"bytes are reserved: {held}")
        for one in list(self._pipelines):
            if not _is_closed(one):
                one.close()
        return found


def _is_closed(pipeline: Pipeline) -> bool:
    # One whose making failed early has no agents, and no exchange.
    exchange = getattr(pipeline, "_exchange", None)
    return exchange is None or exchange.closed


def _noting(made: Callable[..., None], note: Callable[[Any], None]) -> Callable[..., None]:
    def init(one: Any, *arguments: Any, **options: Any) -> None:
        note(one)
        made(one, *arguments, **options)

    return init


def _descriptors() -> list[tuple[int, str]]:
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it was the folder's own
            found.append((int(path.name), str(path.readlink())))
    return found


def _caller(operation: Operation, injector: Injector, place: Place, expected: Any, result: Result) -> None:
    warnings.simplefilter("ignore")
    with ExitStack() as stack:
        stack.enter_context(patched(injector))
        stack.enter_context(interrupted(injector))
        try:
            _drive(operation, injector, place, expected, result)
        except BaseException as error:  # noqa: BLE001 - a promise that was broken
            result.failures.append(f"{type(error).__name__}: {error}")


def _drive(operation: Operation, injector: Injector, place: Place, expected: Any, result: Result) -> None:
    errors: list[BaseException] = []
    answers: list[Any] = []
    closed = False
    call: Callable[[], Any] | None = None
    context: Any = None
    injector.armed = True
    for number in range(_CALLS):
        try:
            if call is None:
                context = operation.opened(place)
                call = context.__enter__()
                if operation.only_opening:
                    injector.disarm()
            answers.append(call())
            if closed:
                result.failures.append("a call works after one that was told that the model is closed")
        except ClosedError as error:
            closed = True
            errors.append(error)
        except BaseException as error:  # noqa: BLE001 - judged below
            errors.append(error)
            if error is injector.error:
                # Where a caller's own exception ends a call, its frames go with it.
                error.__traceback__ = None
                gc.collect()
        injector.disarm()
        if expected is None or (number and len(answers) > len(errors)):
            break
    if expected is None:
        if errors:
            raise errors[0]
        result.answer = expected = answers[0]
    try:
        if context is not None and call is not None:
            context.__exit__(None, None, None)
    except BaseException as error:  # noqa: BLE001 - judged below
        errors.append(error)
    for answer in answers:
        if not _same(answer, expected):
            result.failures.append("an answer is wrong")
    for error in errors:
        result.failures += _faults_of(error, injector, closed=closed)
    if len(errors) > 1 and not closed:
        result.failures.append(f"{len(errors)} errors of one fault: {[repr(one)[:200] for one in errors]}")
    if injector.fault:
        kind = type(errors[0]).__name__ if errors else "right answer"
        result.outcome = f"closed: {kind}" if closed else kind


def _same(one: Any, other: Any) -> bool:
    if isinstance(other, dict):
        return isinstance(one, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in other)
    if isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(other, np.ndarray):
        scale = max(float(np.abs(other).max()), 1e-6) if other.size else 1.0
        return one.shape == other.shape and bool(np.all(np.abs(one - other) <= _CLOSENESS * scale))
    return bool(one == other)


def _faults_of(error: BaseException, injector: Injector, *, closed: bool) -> list[str]:
    """The promises about errors that this one breaks."""
    told = f"{type(error).__name__}: {error}"
    if not injector.fired:
        return [f"an error without a fault: {told}"]
    cause = injector.error
    if injector.fault == "short":
        return [f"a short read is no fault of a file: {told}"]
    if isinstance(error, CommandFailed):
        return error.faults + ([] if _tells(error, injector) else [f"the reason is not told: {told}"])
    if isinstance(cause, CallersOwn | KeyboardInterrupt):
        if error is cause or closed:
            return []
        return [f"the caller's own exception became {told}"]
    if not isinstance(error, PipeloadError):
        return [f"a foreign exception crossed the API: {told}"]
    if cause is not None and not any(link is cause for link in chain(error)) and not _tells(error, injector):
        return [f"the reason is not told: {told}"]
    return []


def _tells(error: BaseException, injector: Injector) -> bool:
    cause, text = injector.error, str(error)
    if cause is None:
        return injector.fault == "zero"
    if isinstance(cause, OSError):
        return str(cause.strerror) in text
    lack = {"no memory": "memory", "no thread": "thread"}.get(injector.fault)
    return any(word in text for word in str(cause).split(". ")) or (lack is not None and lack in text)
