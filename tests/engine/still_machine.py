"""A machine that stands still: the engine's measurements are the same at every moment and beside any other work.

Plans depend on the memory of the process, on free memory, and on how long passes took; how callers share
sweeps and how many tokens are drafted depends on times too. A test that lets the engine measure these asserts something
about the machine of today. So all tests of the engine run with the figures below, unless they are marked as

    @pytest.mark.measures("memory")    occupied and free memory are measured
    @pytest.mark.measures("times")     the engine learns from passes, and drafts as many tokens as these promise
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest

import pipeload.opening
from pipeload.machine.cores import core_capacities
from pipeload.machine.hardware import cores
from pipeload.machine.heap import is_scattered
from pipeload.machine.memory import FreeMemory, rss_bytes, warm_rss_bytes
from pipeload.planning.profile import Profile
from pipeload.planning.replanner import Replanner
from pipeload.tasks.generate import loop
from pipeload.tasks.generate.drafts import DraftLength

__all__ = ["CORES", "FREE_BYTES", "PROCESS_BYTES", "PROFILE", "stand_still"]

PROCESS_BYTES = 200_000_000
"""Memory of the process before a model is opened, and at every moment after that."""
FREE_BYTES = 10**12
CORES = 2
PROFILE = Profile(process_bytes=PROCESS_BYTES, cores=CORES)
"""The process as `pipeload.load` finds it."""

_ENGINE = (
    "pipeload.opening",
    "pipeload.decode",
    "pipeload.planning",
    "pipeload.pipeline",
    "pipeload.measuring.profiler",
)
"""Modules that measure on behalf of a model; those that measure on behalf of a user go on doing so."""


def stand_still(patch: pytest.MonkeyPatch, *, memory: bool = True, times: bool = True) -> None:
    """Let the engine find the figures above instead of measuring."""
    if memory:
        _replace(patch, rss_bytes, lambda: PROCESS_BYTES)
        _replace(patch, warm_rss_bytes, lambda: PROCESS_BYTES)
        patch.setattr(Replanner, "correct", lambda *_, **__: None)
        _replace(patch, cores, lambda: CORES)
        _replace(patch, core_capacities, dict)
        _replace(patch, FreeMemory, lambda: lambda: FREE_BYTES)
        _replace(patch, is_scattered, lambda: False)
    if times:
        patch.setattr(pipeload.opening, "Replanner", _UnlearningReplanner)
        patch.setattr(loop, "DraftLength", _SteadyDraftLength)


class _UnlearningReplanner(Replanner):
    """Its plans depend on budgets and needs alone."""

    def after_pass(self, *_: object) -> bool:
        return False


class _SteadyDraftLength(DraftLength):
    """Drafts cost nothing, and the storage takes longer than computing: only accepted drafts decide."""

    def drafted(self, tokens: int, seconds: float) -> None:
        super().drafted(tokens, 0.0)

    def timed(self, tokens: int, *, read_s: float, computed_s: float) -> None:
        super().timed(tokens, read_s=1.0, computed_s=1e-3 * tokens)


def _replace(patch: pytest.MonkeyPatch, measuring: Callable[..., Any], still: Callable[..., Any]) -> None:
    """Under whatever name a module of the engine has imported it."""
    for module, attribute in _places(measuring):
        patch.setattr(module, attribute, still)


@cache
def _places(measuring: Callable[..., Any]) -> list[tuple[ModuleType, str]]:
    return [
        (module, attribute)
        for name, module in list(sys.modules.items())
        if name.startswith(_ENGINE)
        for attribute, value in vars(module).items()
        if value is measuring
    ]
