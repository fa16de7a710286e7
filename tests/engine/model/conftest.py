"""Fixtures for the tests of the facade."""

from __future__ import annotations

import pytest

from pipeload import model as models
from pipeload.machine.memory import rss_bytes
from pipeload.planning.profile import Profile
from pipeload.planning.replanner import Replanner


@pytest.fixture
def fixed_profile(monkeypatch: pytest.MonkeyPatch) -> Profile:
    """The process measured once, so that plans do not depend on what other tests left in memory."""
    profile = Profile(process_bytes=rss_bytes(), cores=2)
    monkeypatch.setattr(models.profiler, "measure", lambda: profile)
    return profile


@pytest.fixture
def unlearning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that only depend on budgets and inputs, not on how fast the machine is today."""
    monkeypatch.setattr(Replanner, "after_pass", lambda *_: False)
