"""What all tests need from the process that they run in."""

from __future__ import annotations

import signal
import uuid

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, and every program that they start inherits it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_profiles(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of profiles for each test, neither another test's nor that of whoever runs them."""
    monkeypatch.setenv("PIPELOAD_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"))
