"""The one place where a simulation takes the place of Python's threads and clock, the system's files, and onnxruntime.

While it is installed, the modules below have stand-ins for what they imported. Nothing in the engine knows of it, and
it costs nothing when it is not installed. `test_seam` holds the list against the imports of every module of
`pipeline/`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from copy import copy
from types import ModuleType
from typing import Any

from tests.simulation.machine import Machine, SimulatedFcntl, SimulatedMmap, SimulatedOs
from tests.simulation.primitives import SimulatedFuture, Threading, Time
from tests.simulation.sessions import SimulatedSession

import pipeload.pipeline.open_pipelines
import pipeload.pipeline.pipeline  # noqa: F401 - with all that it needs
from pipeload.machine.heap import limit_heap, trim
from pipeload.machine.memory import peak_rss_bytes, rss_bytes
from pipeload.machine.threads import start
from pipeload.pipeline.room import Room
from pipeload.pipeline.session import ShardSession, shrink_arena
from pipeload.planning import planner

__all__ = ["PACKAGES", "REPLACED", "installed", "make_machine_current"]

PACKAGES = ("pipeload.pipeline", "pipeload.planning", "pipeload.storage", "pipeload.tracing", "pipeload.machine")
"""Modules of these packages get the stand-ins."""
_OWN = ("pipeload.pipeline.session",)
"""The module that a simulation replaces as a whole: its lock is that of onnxruntime's arena."""
_machine: list[Machine] = []
_TEXTS: dict[int, tuple[object, str]] = {}
"""Address of an object, which stays where it is -> its text."""


def _current() -> Machine:
    return _machine[-1]


def make_machine_current(machine: Machine) -> None:
    """The stand-ins of the system lead to this machine from now on."""
    _machine[:] = [machine]


REPLACED: dict[str, tuple[Any, Callable[[str], Any]]] = {
    "threading": (threading, Threading),
    "time": (time, lambda _: Time()),
    "Future": (Future, lambda _: SimulatedFuture),
    "ShardSession": (ShardSession, lambda _: SimulatedSession),
    "shrink_arena": (shrink_arena, lambda _: lambda: _current().shrink_arena()),
    "rss_bytes": (rss_bytes, lambda _: lambda: _current().rss_bytes()),
    "peak_rss_bytes": (peak_rss_bytes, lambda _: lambda: _current().peak_rss_bytes()),
    "trim": (trim, lambda _: _nothing),
    "limit_heap": (limit_heap, lambda _: _nothing),
    "start": (start, lambda _: lambda thread: thread.start()),
}
"""Name -> what a module has imported, and module -> what it gets instead."""
_SYSTEM: dict[str, dict[str, tuple[ModuleType, Any]]] = {
    "pipeload.storage.weights": {"os": (os, SimulatedOs(_current))},
    "pipeload.storage.ranges": {"os": (os, SimulatedOs(_current)), "fcntl": (fcntl, SimulatedFcntl())},
    "pipeload.storage.stamps": {"os": (os, SimulatedOs(_current))},
    "pipeload.machine.files": {"os": (os, SimulatedOs(_current))},
    "pipeload.storage.buffers": {"mmap": (mmap, SimulatedMmap(_current))},
}
"""Module -> its modules of the system, and their stand-ins."""


@contextmanager
def installed() -> Iterator[None]:
    """All stand-ins are in their places while the context is open."""
    replaced: list[tuple[ModuleType, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGES) and name not in _OWN:
            for attribute, (real, stand_in) in REPLACED.items():
                # Not where the module itself defines it.
                if vars(module).get(attribute) is real and getattr(real, "__module__", "") != name:
                    replaced.append((module, attribute, real))
                    setattr(module, attribute, stand_in(name))
    for name, modules in _SYSTEM.items():
        module = sys.modules[name]
        for attribute, (real, instead) in modules.items():
            assert vars(module)[attribute] is real
            replaced.append((module, attribute, real))
            setattr(module, attribute, instead)
    planned, recover = planner.make_plan, Room.recover

    def recovered(self: Room) -> None:
        _current().faults.may_raise("recovery", MemoryError)
        recover(self)

    planner.make_plan = _remembered(planned)
    Room.recover = recovered  # type: ignore[method-assign]
    try:
        yield
    finally:
        planner.make_plan, Room.recover = planned, recover  # type: ignore[method-assign]
        for module, attribute, real in replaced:
            setattr(module, attribute, real)


def _remembered(make_plan: Callable[..., Any]) -> Callable[..., Any]:
    """The planner is pure, and takes most of a run's time: one of the same facts is made once."""
    kept: dict[Any, Any] = {}

    def plan(manifest: Any, profile: Any, **options: Any) -> Any:
        key = (
            id(manifest),
            _identity(profile.read_bytes_per_s),
            _identity(profile.times),
            profile.process_bytes,
            profile.runtime_bytes,
            profile.cores,
            *options.values(),
        )
        found = kept.get(key)
        if found is None:
            try:
                found = make_plan(manifest, profile, **options)
            except Exception as error:  # noqa: BLE001 - raised again each time
                found = error
            if len(kept) > 20_000:
                kept.clear()
            # What the key names by its address must stay where it is.
            kept[key] = found, manifest
        else:
            found, _ = found
        if isinstance(found, Exception):
            raise copy(found)
        return found

    return plan


def _identity(figures: object) -> str:
    """The figures as text; the text of an object is made once."""
    found = _TEXTS.get(id(figures))
    if found is None:
        if len(_TEXTS) > 5_000:
            _TEXTS.clear()
        found = _TEXTS[id(figures)] = figures, repr(figures)
    return found[1]


def _nothing() -> None:
    pass
